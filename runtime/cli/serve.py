"""`edgeclip serve`: bundles, indexes and functions over HTTP (Open Inference Protocol v2).

On this machine alone (127.0.0.1) it is plain HTTP and takes every request. On any other
address it takes TLS with a certificate of its own and a token, both made on first use.
"""

import argparse
import ipaddress
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.index import one_thread_for_products
from edgeclip.runtime.cli.options import add_device_option, positive
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.limits import BatchLimits, ServerLimits
from edgeclip.runtime.serving.registry import Sources, open_registry
from edgeclip.runtime.serving.security import Security, TlsFiles, security_for
from edgeclip.runtime.serving.server import address_of, listen, serve

if TYPE_CHECKING:
    from edgeclip.runtime.serving.grpc_server import GrpcDoor

_BATCHES, _LIMITS = BatchLimits(), ServerLimits()
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb to argparse."""
    parser.add_argument(
        "bundles", nargs="*", metavar="[NAME=]BUNDLE", help="bundles to serve (name: their own)"
    )
    parser.add_argument(
        "--cuts",
        action="append",
        default=[],
        metavar="[NAME=]CUTS",
        help="tails of a tower that `edgeclip cut` has cut (name: that of its bundle)",
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
        help="a Python function to serve; the current folder is searched for its module",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address or name (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any (default: 8000)")
    parser.add_argument(
        "--grpc-port", type=int, help="take gRPC calls too, on this port (0 for any)"
    )
    add_device_option(parser)
    _add_limits(parser)
    _add_security(parser)
    parser.add_argument(
        "--echo", action="store_true", help="also serve a model that computes nothing, to measure"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=_BATCHES.max_batch,
        help=f"rows that a model runs at once (default: {_BATCHES.max_batch})",
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
        help=f"requests that may wait for a model (default: {_BATCHES.queue})",
    )
    parser.add_argument(
        "--max-body-mb",
        type=positive,
        default=_LIMITS.max_body // _MIB,
        help=f"MiB of one request (default: {_LIMITS.max_body // _MIB})",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=_LIMITS.grace_seconds,
        help="seconds for what is under way when the server is told to end "
        f"(default: {_LIMITS.grace_seconds:g})",
    )


def _add_security(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file", type=Path, help="the token that clients must show (or $EDGECLIP_TOKEN)"
    )
    parser.add_argument("--tls-cert", type=Path, help="PEM file of the server's certificate")
    parser.add_argument("--tls-key", type=Path, help="PEM file of its key")
    parser.add_argument(
        "--insecure", action="store_true", help="neither TLS nor a token, on any address"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; what is under way then is finished."""
    sources, batches, limits = _checked(args)
    bound = listen(args.host, args.port)
    with bound:
        security = security_for(
            args.host,
            is_local=_is_loopback(bound),
            token_file=args.token_file,
            certificate=args.tls_cert,
            key=args.tls_key,
            is_insecure=args.insecure,
        )
        one_thread_for_products()
        grpc_port = _free_grpc_port(args, bound)
        registry = open_registry(sources, args.device)
        app = App(registry, batches=batches, limits=limits, token=security.token)
        _announce(security)
        address = address_of(bound, security.tls)
        models = ", ".join(registry.names)
        doors = _doors(app, bound.getsockname()[0], grpc_port, security.tls)

        def ready() -> None:
            for door in doors:
                print(f"taking gRPC calls at {door.address}", file=sys.stderr)
            print(f"serving {models} at {address}", flush=True)

        serve(app, bound, tls=security.tls, ready=ready, doors=doors)
    return 0


def _checked(args: argparse.Namespace) -> tuple[Sources, BatchLimits, ServerLimits]:
    if args.function and "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    try:
        return (
            Sources(
                bundles=args.bundles,
                cuts=args.cuts,
                indexes=args.index,
                functions=args.function,
                echo=args.echo,
            ),
            BatchLimits(max_batch=args.max_batch, max_wait_ms=args.max_wait_ms, queue=args.queue),
            ServerLimits(max_body=args.max_body_mb * _MIB, grace_seconds=args.grace),
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _free_grpc_port(args: argparse.Namespace, bound: socket.socket) -> int | None:
    """A port that is free, before anything is loaded; gRPC binds it by itself."""
    if args.grpc_port is None:
        return None
    with listen(bound.getsockname()[0], args.grpc_port) as free:
        port: int = free.getsockname()[1]
    return port


def _doors(app: App, host: str, grpc_port: int | None, tls: TlsFiles | None) -> "list[GrpcDoor]":
    if grpc_port is None:
        return []
    try:
        from edgeclip.runtime.serving.grpc_server import GrpcDoor
    except ImportError as error:
        raise InputError(
            f"--grpc-port needs gRPC ({error}): pip install 'edgeclip[grpc]'"
        ) from None
    return [GrpcDoor(app, host=host, port=grpc_port, tls=tls)]


def _is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def _announce(security: Security) -> None:
    for line in security.lines:
        print(line, file=sys.stderr)
