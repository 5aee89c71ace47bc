"""`python -m edgeclip.runtime.cli.ray_app BUNDLE`: serve on Ray until a signal says to end.

What `edgeclip serve` does in one process, in as many replicas as are asked for.
"""

import argparse
import ipaddress
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.options import add_device_option, positive
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.serving.ray_serving import RayServing, on_ray
from edgeclip.runtime.serving.security import Security, choose_security
from edgeclip.runtime.serving.server import listen

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; the exit status, 2 for a user's mistake."""
    args = _parser().parse_args(argv)
    try:
        security = _security(args)
        for line in security.lines:
            print(line, file=sys.stderr)
        serving = _serving(args, security)
        with on_ray(
            serving, host=args.host, port=args.port, tls=security.tls, cluster=args.cluster
        ) as address:
            ended = _until_signal()
            print(f"serving on Ray at {address}", flush=True)
            ended.wait()
    except EdgeClipError as error:
        print(f"edgeclip: error: {error}", file=sys.stderr)
        return _USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgeclip-ray", description="Serve bundles on Ray.")
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help="bundles to serve")
    parser.add_argument(
        "--function",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a Python function to serve, from a module that every machine has",
    )
    parser.add_argument("--replicas", type=positive, default=1, help="how many (default: 1)")
    parser.add_argument("--max-replicas", type=positive, help="add some under load, up to so many")
    parser.add_argument("--cpus", type=float, default=1.0, help="of one replica (default: 1)")
    parser.add_argument("--gpus", type=float, default=0.0, help="of one replica (default: 0)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any (default: 8000)")
    parser.add_argument("--cluster", help="address of a Ray cluster (default: Ray starts here)")
    parser.add_argument("--token-file", type=Path, help="the token that clients must show")
    parser.add_argument("--tls-cert", type=Path, help="PEM file of the certificate")
    parser.add_argument("--tls-key", type=Path, help="PEM file of its key")
    parser.add_argument("--insecure", action="store_true", help="neither TLS nor a token")
    add_device_option(parser)
    return parser


def _security(args: argparse.Namespace) -> Security:
    with listen(args.host, args.port) as bound:
        is_local = ipaddress.ip_address(bound.getsockname()[0]).is_loopback
    return choose_security(
        args.host,
        is_local=is_local,
        token_file=args.token_file,
        certificate=args.tls_cert,
        key=args.tls_key,
        is_insecure=args.insecure,
    )


def _serving(args: argparse.Namespace, security: Security) -> RayServing:
    for path in args.bundles:
        Bundle.open(Path(path))  # one clear error here, and not one in each replica
    try:
        return RayServing(
            bundles=tuple(str(Path(path).resolve()) for path in args.bundles),
            functions=tuple(args.function),
            device=args.device,
            replicas=args.replicas,
            max_replicas=args.max_replicas,
            cpus=args.cpus,
            gpus=args.gpus,
            token=security.token,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _until_signal() -> threading.Event:
    """An event that SIGINT and SIGTERM set; Ray's own handlers would end the process at once."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


if __name__ == "__main__":
    sys.exit(main())
