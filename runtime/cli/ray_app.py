"""`python -m edgeclip.runtime.cli.ray_app BUNDLE`: serve on Ray until SIGINT or SIGTERM.

It serves like `edgeclip serve`, but in several replicas.
"""

import argparse
import ipaddress
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import ensure_home
from edgeclip.runtime.cli.options import add_device_option, positive
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.logs import log_to_stderr
from edgeclip.runtime.serving.ray_serving import RayServing, on_ray
from edgeclip.runtime.serving.security import Security, choose_security
from edgeclip.runtime.serving.server import listen

_log = logging.getLogger("edgeclip.runtime.cli.ray_app")  # __name__ may be "__main__"
_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Serve and return the exit status: 2 for a user's mistake."""
    args = _parser().parse_args(argv)
    with log_to_stderr():
        try:
            ensure_home()
            security = _security(args)
            for line in security.lines:
                _log.info("%s", line)
            serving = _serving(args, security)
            with on_ray(
                serving, host=args.host, port=args.port, tls=security.tls, cluster=args.cluster
            ) as address:
                ended = _until_signal()
                print(f"serving on Ray at {address}", flush=True)
                ended.wait()
        except EdgeClipError as error:
            _log.error("%s", error)
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
        help="a Python function to serve; every machine must have its module",
    )
    parser.add_argument(
        "--replicas", type=positive, default=1, help="number of replicas (default: 1)"
    )
    parser.add_argument("--max-replicas", type=positive, help="scale up to this number under load")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPUs of one replica (default: 1)")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of one replica (default: 0)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default: 8000)")
    parser.add_argument("--cluster", help="address of a Ray cluster (default: Ray starts here)")
    parser.add_argument("--token-file", type=Path, help="file with the bearer token")
    parser.add_argument("--tls-cert", type=Path, help="certificate of the server (PEM)")
    parser.add_argument("--tls-key", type=Path, help="private key of the certificate (PEM)")
    parser.add_argument("--insecure", action="store_true", help="use neither TLS nor a token")
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
        Bundle.open(Path(path))  # one clear error here instead of one in each replica
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
    """Return an event that SIGINT and SIGTERM set; Ray's handlers would exit at once."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


if __name__ == "__main__":
    sys.exit(main())
