"""The gRPC way into the server: a port of its own beside that of HTTP.

gRPC's server with threads is used and not its asyncio one, which ends for good when anybody
sends it a path that is not UTF-8 (grpcio 1.85).
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.grpc_messages import SERVICE
from edgeclip.runtime.serving.grpc_service import GrpcService
from edgeclip.runtime.serving.limits import ServerLimits
from edgeclip.runtime.serving.tls import TlsFiles

_MOST_CALLS = 256  # each has a thread while it is answered
_LAST_SECONDS = 1.0  # for the last answers to be sent
_LOOK_SECONDS = 1.0  # between two looks for slow calls
_IDENTITY_ALONE = 1  # bit set of the compression algorithms that are taken


class GrpcDoor:
    """Takes gRPC calls while it is open.

    Args:
        app: the application, which has to be started first, and drained before `close`.
        host: address to listen on.
        port: 0 lets the system choose.
        tls: certificate and key; None for neither.
    """

    def __init__(self, app: App, *, host: str, port: int, tls: TlsFiles | None = None) -> None:
        self._app = app
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._tls = tls
        self._server: grpc.Server | None = None
        self._looking: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Host and port, as gRPC's clients take them; the port is known once this is open."""
        return f"{self._host}:{self._port}"

    async def open(self) -> None:
        """Listen.

        Raises:
            InputError: the port cannot be had, or the certificate not be used.
        """
        limits = self._app.limits
        # Even if each of them sends all that it may, they stay within max_memory.
        calls = max(1, min(_MOST_CALLS, limits.max_memory // limits.max_body))
        service = GrpcService(self._app, asyncio.get_running_loop())
        server = grpc.server(
            ThreadPoolExecutor(calls, thread_name_prefix="edgeclip grpc"),
            [grpc.method_handlers_generic_handler(SERVICE, service.handlers())],
            options=_options(limits),
            maximum_concurrent_rpcs=calls,
        )
        try:
            if self._tls is None:
                self._port = server.add_insecure_port(self.address)
            else:
                self._port = server.add_secure_port(self.address, _credentials(self._tls))
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot listen on {self.address} for gRPC: {error}") from None
        server.start()
        self._server = server
        self._looking = asyncio.create_task(_look(service, limits))

    async def close(self) -> None:
        """Stop listening, and end what is still under way."""
        if self._server is None or self._looking is None:
            return
        self._looking.cancel()
        await asyncio.to_thread(self._server.stop(_LAST_SECONDS).wait)


async def _look(service: GrpcService, limits: ServerLimits) -> None:
    while True:
        await asyncio.sleep(min(_LOOK_SECONDS, limits.body_seconds))
        service.end_slow_calls()


def _options(limits: ServerLimits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_connection_idle_ms", 1000 * limits.idle_seconds),
        # A compressed message can be a thousand times as long as it seems.
        ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ALONE),
        ("grpc.so_reuseport", 0),  # else two servers may share a port without a word
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
