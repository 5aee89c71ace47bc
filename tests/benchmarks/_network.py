"""A device and a server on one machine with a link between them, as slow as is asked for.

Two network namespaces, each with a TUN device; a process of ours (`_network_relay.py`) carries
every packet from one to the other after its serialisation, the delay, and perhaps a loss. So
the kernel's own TCP sees the link: its round trip, its congestion window, its retransmissions.
`tc` would do with less, but `netem` is often missing, and a token bucket (`tbf`) lets the first
packets of a burst through for nothing, which no link does.

Rates count IP packets: of 1500 bytes 1448 are payload. Needs root, `ip` and /dev/net/tun.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Side = Literal["device", "server"]

SIDES: tuple[Side, Side] = ("device", "server")
ADDRESSES: dict[Side, str] = {"device": "10.213.0.1", "server": "10.213.0.2"}
INTERFACE = "link0"
EFFICIENCY = 1448 / 1500  # payload in a full packet
NETNS = Path("/var/run/netns")

_RELAY = Path(__file__).with_name("_network_relay.py")
_NEW_NET = 0x40000000  # CLONE_NEWNET, setns(2)
_NAME = re.compile(r"edgeclip-(\d+)-(?:device|server)")


class NetworkUnavailableError(Exception):
    """No such network can be made here; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the link is like: 10^6 bits per second of IP packets, milliseconds, share lost."""

    up_mbps: float
    down_mbps: float
    rtt_ms: float
    loss: float = 0.0


class Network:
    """Both namespaces and the relay between them, while `shaped_network` is open."""

    def __init__(self, names: dict[Side, str], relay: "subprocess.Popen[str]") -> None:
        self._names, self._relay = names, relay

    @property
    def server_address(self) -> str:
        """The server's IP address, as the device reaches it."""
        return ADDRESSES["server"]

    def command(self, side: Side, words: Sequence[str]) -> list[str]:
        """A command line that runs `words` on one side."""
        return ["ip", "netns", "exec", self._names[side], *words]

    @contextlib.contextmanager
    def entered(self, side: Side) -> Iterator[None]:
        """Let the sockets that this thread makes in the block be of one side."""
        own = Path(f"/proc/self/task/{threading.get_native_id()}/ns/net")
        with own.open() as before, (NETNS / self._names[side]).open() as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())

    def shape(self, shape: Shape) -> None:
        """Change the link; packets under way arrive as they would have."""
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.write(json.dumps(asdict(shape)) + "\n")
        self._relay.stdin.flush()
        if self._relay.stdout.readline().strip() != "shaped":
            raise RuntimeError("the relay of the shaped network ended")


@contextlib.contextmanager
def shaped_network(shape: Shape, *, seed: int = 0) -> Iterator[Network]:
    """Make both sides and the link; all of it is gone afterwards.

    Args:
        shape: at the beginning.
        seed: of which packets are lost.

    Raises:
        NetworkUnavailableError: no root, no `ip`, no TUN, or the kernel refuses.
    """
    _check()
    _remove_leftovers()
    names: dict[Side, str] = {side: f"edgeclip-{os.getpid()}-{side}" for side in SIDES}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        ends = [str(NETNS / name) for name in names.values()]
        relay = subprocess.Popen(
            [sys.executable, str(_RELAY), *ends, INTERFACE, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, relay)
        assert relay.stdout is not None
        if relay.stdout.readline().strip() != "ready":
            raise NetworkUnavailableError("the relay could not open its TUN devices, see above")
        for side, name in names.items():
            _configure(name, ADDRESSES[side])
        network = Network(names, relay)
        network.shape(shape)
        yield network


def _check() -> None:
    wrong = None
    if sys.platform != "linux" or os.geteuid() != 0:
        wrong = "root on Linux"
    elif shutil.which("ip") is None:
        wrong = "the command `ip` (package iproute2)"
    elif not Path("/dev/net/tun").exists():
        wrong = "/dev/net/tun"
    if wrong:
        raise NetworkUnavailableError(f"a shaped network needs {wrong}: it cannot be made here")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NetworkUnavailableError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _configure(name: str, address: str) -> None:
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
    _ip("-n", name, "link", "set", INTERFACE, "up")
    # Every connection begins as the first one did, and with the textbook's slow start.
    settings = ("net.ipv4.tcp_no_metrics_save=1", "net.ipv4.tcp_congestion_control=reno")
    for setting in settings:
        command = ["ip", "netns", "exec", name, "sysctl", "-q", "-w", setting]
        subprocess.run(command, capture_output=True, check=False)


def _remove_leftovers() -> None:
    """Remove namespaces of benchmarks that were killed."""
    for path in NETNS.glob("edgeclip-*"):
        match = _NAME.fullmatch(path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with contextlib.suppress(NetworkUnavailableError):
                _ip("netns", "delete", path.name)


def _end(relay: "subprocess.Popen[str]") -> None:
    assert relay.stdin is not None
    relay.stdin.close()  # which ends it
    try:
        relay.wait(timeout=5)
    except subprocess.TimeoutExpired:
        relay.kill()
        relay.wait()


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NEW_NET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
