"""A TCP proxy between a device and a real server that can do to connections what networks do."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Mode = Literal["pass", "swallow", "busy", "truncate", "trickle", "garbage", "slow"]

_CHUNK = 1 << 16
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_GARBAGE = b"\x16\x03\x01 no HTTP at all\r\n\r\n"


class FaultyProxy:
    """Passes bytes on, or does what `mode` says; it may be changed at any time.

    Modes: "swallow" accepts and reads but never answers; "busy" answers each request with 503;
    "truncate" ends each reply some bytes early; "trickle" sends replies byte by byte;
    "garbage" answers what is no HTTP; "slow" hands replies on after `slow_s`.

    Args:
        port: where the server listens on this machine.
        slow_s: see above.

    Attributes:
        port: where the proxy listens.
    """

    def __init__(self, port: int, slow_s: float) -> None:
        self._target, self._slow_s = port, slow_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._mode: Mode = "pass"
        self._changed = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> Mode:
        """What it does."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()  # wakes what trickles or waits
        self._changed = threading.Event()

    def lead_to(self, port: int) -> None:
        """Lead new connections to another server, and break those that there are."""
        self._target = port
        self.break_connections()

    def break_connections(self) -> None:
        """End every connection, as when a server restarts."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop."""
        self._listener.close()
        self.break_connections()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._kept(client), contextlib.ExitStack() as stack:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=1)
            except OSError:
                if self._mode == "pass":
                    return  # the server is gone: so is the connection
                server = socket.socket()  # what is sent there is not needed
            stack.enter_context(self._kept(server))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.settimeout(None)
            back = threading.Thread(target=self._pump_back, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        """Requests."""
        with suppress(OSError):
            while data := client.recv(_CHUNK):
                if self._mode in ("busy", "garbage"):
                    client.sendall(_BUSY if self._mode == "busy" else _GARBAGE)
                    client.shutdown(socket.SHUT_WR)
                elif self._mode != "swallow":
                    server.sendall(data)

    def _pump_back(self, server: socket.socket, client: socket.socket) -> None:
        """Replies."""
        with suppress(OSError):
            while data := server.recv(_CHUNK):
                if not self._hand_on(data, client):
                    break
        with suppress(OSError):
            if self._mode != "swallow":
                client.shutdown(socket.SHUT_RDWR)

    def _hand_on(self, data: bytes, client: socket.socket) -> bool:
        """Send a part of a reply as the mode has it; whether the connection goes on."""
        mode, changed = self._mode, self._changed
        if mode == "truncate":
            client.sendall(data[: -len(data) // 4])
            return False
        if mode == "trickle":
            for byte in data:
                client.sendall(bytes([byte]))
                changed.wait(0.005)
            return True
        if mode == "slow":
            changed.wait(self._slow_s)
        if mode != "swallow":
            client.sendall(data)
        return True

    @contextmanager
    def _kept(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()


def can_drop_packets() -> bool:
    """Whether this process may tell the kernel to drop packets."""
    if os.geteuid() != 0 or shutil.which("iptables") is None:
        return False
    return subprocess.run(["iptables", "-L", "INPUT"], capture_output=True).returncode == 0


@contextmanager
def packets_dropped(port: int) -> Iterator[None]:
    """Drop all packets to a TCP port of this machine, new connections and old ones."""
    rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"]
    subprocess.run(["iptables", "-I", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run(["iptables", "-D", *rule], check=True)
