"""A device and a server on one machine with a link between them, as slow as is asked for.

Two network namespaces, each with a TUN device; a process of ours (this file as a script) carries
every packet from one to the other after its serialisation and the delay, so that the kernel's own
TCP sees the link. `tc` would do with less, but `netem` is often missing, and a token bucket (`tbf`)
lets the first packets of a burst through for nothing, which no link does. Rates count IP packets:
of 1500 bytes 1448 are payload. Needs root, `ip` and /dev/net/tun.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from _processes import UnavailableError

Side = Literal["device", "server"]

ADDRESSES: dict[Side, str] = {"device": "10.213.0.1", "server": "10.213.0.2"}
EFFICIENCY = 1448 / 1500  # payload in a full packet

_INTERFACE = "link0"
_NETNS = Path("/var/run/netns")
_NEW_NET = 0x40000000  # CLONE_NEWNET, setns(2)
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_LARGEST_PACKET = 65535
_MOST_WAITING = 1000  # packets in front of the link; more are dropped, as by a switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the link is like: 10^6 bits per second of IP packets, and milliseconds."""

    up_mbps: float
    down_mbps: float
    rtt_ms: float


class Network:
    """Both namespaces and the relay between them, while `shaped_network` is open."""

    def __init__(self, names: dict[Side, str], relay: "subprocess.Popen[str]") -> None:
        self._names, self._relay = names, relay

    def command(self, side: Side, words: Sequence[str]) -> list[str]:
        """A command line that runs `words` on one side."""
        return ["ip", "netns", "exec", self._names[side], *words]

    @contextlib.contextmanager
    def entered(self, side: Side) -> Iterator[None]:
        """Let the sockets that this thread makes in the block be of one side."""
        own = Path(f"/proc/self/task/{threading.get_native_id()}/ns/net")
        with own.open() as before, (_NETNS / self._names[side]).open() as there:
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
def shaped_network(shape: Shape) -> Iterator[Network]:
    """Make both sides and the link; all of it is gone afterwards."""
    tun, ip = Path("/dev/net/tun").exists(), shutil.which("ip")
    if os.geteuid() != 0 or not tun or ip is None:
        raise UnavailableError("a shaped network needs root, /dev/net/tun and `ip` (iproute2)")
    names: dict[Side, str] = {side: f"edgeclip-{os.getpid()}-{side}" for side in ADDRESSES}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        words = [sys.executable, __file__, *(str(_NETNS / name) for name in names.values())]
        pipe = subprocess.PIPE
        relay = stack.enter_context(subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True))
        stack.callback(relay.kill)
        assert relay.stdout is not None
        if relay.stdout.readline().strip() != "ready":
            raise UnavailableError("the relay could not open its TUN devices, see above")
        for side, name in names.items():
            _configure(name, ADDRESSES[side])
        network = Network(names, relay)
        network.shape(shape)
        yield network


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _configure(name: str, address: str) -> None:
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", _INTERFACE)
    _ip("-n", name, "link", "set", _INTERFACE, "up")
    # Every connection begins as the first one did, and with the textbook's slow start.
    for setting in ("net.ipv4.tcp_no_metrics_save=1", "net.ipv4.tcp_congestion_control=reno"):
        command = ["ip", "netns", "exec", name, "sysctl", "-q", "-w", setting]
        subprocess.run(command, capture_output=True, check=False)


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NEW_NET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass(slots=True)
class _Direction:
    source: int  # file descriptor of the TUN device that packets come from
    target: int
    mbps: float = 1000.0
    delay: float = 0.0  # seconds
    free_at: float = 0.0  # when the last packet will have been serialised
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self) -> None:
        """Read all packets that are there and say when each will arrive."""
        while True:
            try:
                packet = os.read(self.source, _LARGEST_PACKET)
            except BlockingIOError:
                return
            if len(self.waiting) < _MOST_WAITING:
                self.free_at = max(time.monotonic(), self.free_at) + len(packet) * 8e-6 / self.mbps
                self.waiting.append((self.free_at + self.delay, packet))

    def give(self) -> float:
        """Hand over what has arrived; return seconds until the next packet does, at most 1."""
        while self.waiting:
            left = self.waiting[0][0] - time.monotonic()
            if left > 0:
                return left
            with contextlib.suppress(OSError):  # an interface that is not up yet
                os.write(self.target, self.waiting.popleft()[1])
        return 1.0


def _open_tun(namespace: str) -> int:
    """Make a TUN device in a namespace; its file descriptor works from anywhere."""
    with open(namespace) as there:
        _setns(there.fileno())
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH14x", _INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def _relay(namespaces: Sequence[str]) -> None:
    """Carry packets between two namespaces; each line on stdin is a shape, its end ends it."""
    device, server = map(_open_tun, namespaces)
    up, down = _Direction(device, server), _Direction(server, device)
    with contextlib.suppress(OSError):  # a late relay would measure the scheduler
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    pause = 0.0
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([device, server, sys.stdin], [], [], pause)
        if sys.stdin in readable:
            line = sys.stdin.readline()
            if not line:
                return
            shape = json.loads(line)
            up.mbps, down.mbps = shape["up_mbps"], shape["down_mbps"]
            up.delay = down.delay = shape["rtt_ms"] / 2e3
            print("shaped", flush=True)
        for direction in (up, down):
            direction.take()
        pause = min(direction.give() for direction in (up, down))


if __name__ == "__main__":
    _relay(sys.argv[1:])
