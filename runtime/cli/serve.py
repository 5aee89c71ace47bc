"""`edgeclip serve`: serve bundles, indexes and functions over HTTP (Open Inference Protocol v2).

On the loopback address (the default) it uses plain HTTP without a token. On any other address it
uses TLS and requires a bearer token; certificate and token are created on first use.
"""

import argparse
import ipaddress
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.index import limit_blas_to_one_thread
from edgeclip.runtime.cli.options import add_device_option, positive
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.limits import BatchLimits, ServerLimits
from edgeclip.runtime.serving.registry import Sources, open_registry
from edgeclip.runtime.serving.security import TlsFiles, choose_security
from edgeclip.runtime.serving.server import listen, serve, url_of

if TYPE_CHECKING:
    from edgeclip.runtime.serving.grpc_server import GrpcListener

_log = logging.getLogger(__name__)
_BATCHES, _LIMITS = BatchLimits(), ServerLimits()
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "bundles", nargs="*", metavar="[NAME=]BUNDLE", help="bundles to serve (name: their own)"
    )
    parser.add_argument(
        "--cuts",
        action="append",
        default=[],
        metavar="[NAME=]CUTS",
        help="tails of the cut set that `edgeclip cut` wrote (name: that of its bundle)",
    )
    parser.add_argument(
        "--index",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="an index made by `edgeclip embed` to search in (name: that of the file)",
    )
    parser.add_argument(
        "--function",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a Python function to serve; its module may lie in the current folder",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address or host name to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port; 0 for any free one (default: 8000)"
    )
    parser.add_argument(
        "--grpc-port", type=int, help="also serve gRPC on this port (0 for any free one)"
    )
    add_device_option(parser, tuned=True)
    _add_limits(parser)
    _add_security(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=_BATCHES.max_batch,
        help=f"rows of a batch at most (default: {_BATCHES.max_batch})",
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=_BATCHES.max_wait_ms,
        help=f"how long an idle model waits for more rows (default: {_BATCHES.max_wait_ms:g})",
    )
    parser.add_argument(
        "--queue",
        type=positive,
        default=_BATCHES.queue,
        help=f"requests that may wait for one model (default: {_BATCHES.queue})",
    )
    parser.add_argument(
        "--max-body-mb",
        type=positive,
        default=_LIMITS.max_body // _MIB,
        help=f"size of one request in MiB at most (default: {_LIMITS.max_body // _MIB})",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=_LIMITS.grace_seconds,
        help="seconds to finish the requests in flight at shutdown "
        f"(default: {_LIMITS.grace_seconds:g})",
    )


def _add_security(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file", type=Path, help="file with the bearer token (default: $EDGECLIP_TOKEN)"
    )
    parser.add_argument("--tls-cert", type=Path, help="certificate of the server (PEM)")
    parser.add_argument("--tls-key", type=Path, help="private key of the certificate (PEM)")
    parser.add_argument(
        "--insecure", action="store_true", help="use neither TLS nor a token, on any address"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then finish the requests in flight."""
    sources, batches, limits = _check_options(args)
    bound = listen(args.host, args.port)
    with bound:
        security = choose_security(
            args.host,
            is_local=_is_loopback(bound),
            token_file=args.token_file,
            certificate=args.tls_cert,
            key=args.tls_key,
            is_insecure=args.insecure,
        )
        limit_blas_to_one_thread()
        grpc_port = _free_grpc_port(args, bound)
        registry = open_registry(sources, args.device)
        app = App(registry, batches=batches, limits=limits, token=security.token)
        for line in security.lines:
            _log.info("%s", line)
        url = url_of(bound, security.tls)
        models = ", ".join(registry.names)
        listeners = _grpc_listeners(app, bound.getsockname()[0], grpc_port, security.tls)

        def ready() -> None:
            for listener in listeners:
                _log.info("serving gRPC at %s", listener.address)
            print(f"serving {models} at {url}", flush=True)

        serve(app, bound, tls=security.tls, ready=ready, listeners=listeners)
    return 0


def _check_options(args: argparse.Namespace) -> tuple[Sources, BatchLimits, ServerLimits]:
    if args.function and "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    try:
        return (
            Sources(
                bundles=args.bundles,
                cuts=args.cuts,
                indexes=args.index,
                functions=args.function,
            ),
            BatchLimits(max_batch=args.max_batch, max_wait_ms=args.max_wait_ms, queue=args.queue),
            ServerLimits(max_body=args.max_body_mb * _MIB, grace_seconds=args.grace),
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _free_grpc_port(args: argparse.Namespace, bound: socket.socket) -> int | None:
    """Find a free port before anything is loaded; gRPC binds it later."""
    if args.grpc_port is None:
        return None
    with listen(bound.getsockname()[0], args.grpc_port) as free:
        port: int = free.getsockname()[1]
    return port


def _grpc_listeners(
    app: App, host: str, grpc_port: int | None, tls: TlsFiles | None
) -> "list[GrpcListener]":
    if grpc_port is None:
        return []
    try:
        from edgeclip.runtime.serving.grpc_server import GrpcListener
    except ImportError as error:
        raise InputError(
            f"--grpc-port needs gRPC ({error}): pip install 'edgeclip[grpc]'"
        ) from None
    return [GrpcListener(app, host=host, port=grpc_port, tls=tls)]


def _is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback
