"""Carries packets between two network namespaces as a link of a given shape would.

    _network_relay.py NAMESPACE NAMESPACE INTERFACE SEED

Prints `ready` once both TUN devices are there. Each line on stdin is a shape as JSON, answered
by `shaped`; the end of stdin ends it.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_NEW_NET = 0x40000000
_LARGEST_PACKET = 65535
_MOST_WAITING = 1000  # packets in front of the link; more are dropped, as by a switch
_IDLE_SECONDS = 1.0


@dataclass(slots=True)
class Direction:
    """One way of the link."""

    source: int  # file descriptor of the TUN device that packets come from
    target: int
    mbps: float = 1000.0
    delay: float = 0.0  # seconds
    loss: float = 0.0
    free_at: float = 0.0  # when the last packet will have been serialised
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, draw: random.Random) -> None:
        """Read all packets that are there and say when each will arrive."""
        while True:
            try:
                packet = os.read(self.source, _LARGEST_PACKET)
            except BlockingIOError:
                return
            now = time.monotonic()
            if len(self.waiting) >= _MOST_WAITING:
                continue
            self.free_at = max(now, self.free_at) + len(packet) * 8e-6 / self.mbps
            if draw.random() >= self.loss:
                self.waiting.append((self.free_at + self.delay, packet))

    def give(self) -> float:
        """Hand over what has arrived; return seconds until the next packet does."""
        while self.waiting:
            left = self.waiting[0][0] - time.monotonic()
            if left > 0:
                return left
            _, packet = self.waiting.popleft()
            with contextlib.suppress(OSError):  # an interface that is not up yet
                os.write(self.target, packet)
        return _IDLE_SECONDS


def open_tun(namespace: str, interface: str) -> int:
    """Make a TUN device in a namespace; its file descriptor works from anywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as there:
        if libc.setns(there.fileno(), _NEW_NET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH14x", interface.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def main() -> int:
    """Carry packets until stdin ends."""
    device, server, interface, seed = sys.argv[1:]
    ends = [open_tun(namespace, interface) for namespace in (device, server)]
    up, down = Direction(ends[0], ends[1]), Direction(ends[1], ends[0])
    with contextlib.suppress(OSError):  # a late relay would measure the scheduler
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    draw = random.Random(int(seed))
    print("ready", flush=True)
    pause = 0.0
    while True:
        readable, _, _ = select.select([*ends, sys.stdin], [], [], pause)
        if sys.stdin in readable:
            line = sys.stdin.readline()
            if not line:
                return 0
            shape = json.loads(line)
            for direction, rate in ((up, "up_mbps"), (down, "down_mbps")):
                direction.mbps = shape[rate]
                direction.delay = shape["rtt_ms"] / 2e3
                direction.loss = shape["loss"]
            print("shaped", flush=True)
        for direction in (up, down):
            direction.take(draw)
        pause = min(direction.give() for direction in (up, down))


if __name__ == "__main__":
    sys.exit(main())
