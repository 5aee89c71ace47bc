"""Run commands where nothing can leave, and tell what they tried to send.

`watch` starts this file as a program in a network and mount namespace of its own (`unshare`),
where every address is one of the loopback interface: whatever is sent, to whichever address, is
seen there and refused at once. Names are asked for at an address that nobody has, not through a
service of the machine.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount")
_NAME_SERVER = "192.0.2.53"  # of a network that is kept for documents (RFC 5737)
_PATIENCE = 1800.0  # seconds for all commands on a busy machine
_ALL_PROTOCOLS = 3  # ETH_P_ALL
_OUTGOING = 4  # PACKET_OUTGOING: each packet of the loopback is seen twice
# Numbers of rtnetlink(7).
_NEW_ROUTE, _NEW_LINK = 24, 16
_REQUEST, _ACKNOWLEDGE, _CREATE = 1, 4, 0x400
_UP = 1
_LOCAL_TABLE, _STATIC, _HOST_SCOPE, _LOCAL = 255, 4, 254, 2
_ROUTE_OUT = 4  # RTA_OIF


def why_not() -> str | None:
    """Why such a namespace cannot be had here; None if it can."""
    if shutil.which(_UNSHARE[0]) is None:
        return "there is no unshare, which makes network namespaces (util-linux)"
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    return None


def watch(
    commands: Sequence[Sequence[str]],
    folder: Path,
    environment: Mapping[str, str],
    *,
    beside: Sequence[str] = (),
) -> list[str]:
    """Run commands one after the other, and one more `beside` them; return what they sent.

    Each entry is "PROTOCOL ADDRESS:PORT TEXT" with the readable part of what a packet holds.

    Args:
        commands: command lines; each must end with exit status 0.
        folder: where they run.
        environment: all of their environment.
        beside: begins before the others, and is waited for after them.
    """
    plan = json.dumps({"commands": [list(map(str, item)) for item in commands], "beside": beside})
    done = subprocess.run(
        [*_UNSHARE, sys.executable, __file__, plan],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=_PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main() -> None:
    plan = json.loads(sys.argv[1])
    _make_every_address_local()
    _hide_name_services()
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL_PROTOCOLS)) as seen:
        seen.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        sent: list[str] = []
        threading.Thread(target=_collect, args=(seen, sent), daemon=True).start()
        first = subprocess.Popen(plan["beside"]) if plan["beside"] else None
        try:
            for words in plan["commands"]:
                subprocess.run(words, check=True, stdout=sys.stderr)
        finally:
            status = first.wait(_PATIENCE) if first else 0
        assert status == 0, plan["beside"]
        time.sleep(0.2)  # for the thread to read what is there
    print(json.dumps(sent))


def _make_every_address_local() -> None:
    loopback = socket.if_nametoindex("lo")
    _ask_kernel(_NEW_LINK, struct.pack("BxHiII", socket.AF_UNSPEC, 0, loopback, _UP, _UP))
    for family in (socket.AF_INET, socket.AF_INET6):
        route = struct.pack(
            "8BI", family, 0, 0, 0, _LOCAL_TABLE, _STATIC, _HOST_SCOPE, _LOCAL, 0
        ) + struct.pack("HHi", 8, _ROUTE_OUT, loopback)
        _ask_kernel(_NEW_ROUTE, route, _CREATE)


def _ask_kernel(kind: int, content: bytes, more: int = 0) -> None:
    flags = _REQUEST | _ACKNOWLEDGE | more
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(content), kind, flags, 1, 0) + content)
        (error,) = struct.unpack_from("i", kernel.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error))


def _hide_name_services() -> None:
    files = {
        "/etc/resolv.conf": f"nameserver {_NAME_SERVER}\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    for name, text in files.items():
        if os.path.exists(name):
            with tempfile.NamedTemporaryFile("w", delete=False) as file:
                file.write(text)
            os.chmod(file.name, 0o644)
            subprocess.run(["mount", "--bind", file.name, name], check=True)
            os.unlink(file.name)


def _collect(seen: socket.socket, sent: list[str]) -> None:
    while True:
        try:
            packet, address = seen.recvfrom(1 << 16)
        except OSError:  # closed
            return
        described = _describe(packet) if address[2] != _OUTGOING else None
        if described is not None:
            sent.append(described)


def _describe(packet: bytes) -> str | None:
    """Describe an IP packet; None for one that stays on the loopback's own addresses."""
    if packet[0] >> 4 == 4:
        family, protocol, addresses = socket.AF_INET, packet[9], (packet[12:16], packet[16:20])
        content = packet[4 * (packet[0] & 15) :]
        own = all(address[0] == 127 for address in addresses)
    else:
        family, protocol, addresses = socket.AF_INET6, packet[6], (packet[8:24], packet[24:40])
        content = packet[40:]
        own = all(address == b"\0" * 15 + b"\1" for address in addresses)
    if own:
        return None
    name = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}.get(protocol, str(protocol))
    port = struct.unpack_from("!H", content, 2)[0] if len(content) >= 4 else 0
    text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in content[8:200])
    return f"{name} {socket.inet_ntop(family, addresses[1])}:{port} {text}"


if __name__ == "__main__":
    _main()
