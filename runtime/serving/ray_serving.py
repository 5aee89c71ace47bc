"""Run the server on Ray Serve: the same application in several replicas.

For `serve deploy config.yaml` the `import_path` is
`edgeclip.runtime.serving.ray_serving:application`, and the `args` are the fields of `RayServing`;
the command `python -m edgeclip.runtime.cli.ray_app` does so itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge

from edgeclip.runtime.bundle.index import limit_blas_to_one_thread
from edgeclip.runtime.device.schema import check_bounds, parse
from edgeclip.runtime.errors import InputError, MissingExtraError
from edgeclip.runtime.serving.app import App
from edgeclip.runtime.serving.limits import BatchLimits, ServerLimits
from edgeclip.runtime.serving.registry import Sources, open_registry
from edgeclip.runtime.serving.security import TlsFiles
from edgeclip.runtime.serving.server import listen, url_of

_NAME = "edgeclip"
_BATCHES, _LIMITS = BatchLimits(), ServerLimits()
_MAX_TRIES = 2  # to load a replica


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServing:
    """What the replicas serve, and how many replicas there are.

    Attributes:
        bundles, cuts, indexes, functions: sources as in `Sources`; every machine of the cluster has
            to have their files.
        device: name of a device or its YAML file, as for `edgeclip serve`.
        replicas: number of replicas; with `max_replicas`, the minimum.
        max_replicas: maximum for autoscaling; None for a fixed number.
        cpus: CPUs of one replica, as Ray counts them.
        gpus: likewise.
        max_batch: rows of one batch, and number of requests to one replica from which on Ray
            adds another replica.
        queue: requests in flight in one replica at most.
        grace_seconds: seconds that requests in flight get when a replica shuts down.
        token: bearer token that clients must send; None for none.

    Raises:
        ValueError: nothing to serve, or a value out of bounds.
    """

    bundles: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    device: str = "this-machine"
    replicas: Annotated[int, Ge(1)] = 1
    max_replicas: Annotated[int | None, Ge(1)] = None
    cpus: Annotated[float, Ge(0)] = 1.0
    gpus: Annotated[float, Ge(0)] = 0.0
    max_batch: Annotated[int, Ge(1)] = _BATCHES.max_batch
    queue: Annotated[int, Ge(1)] = _BATCHES.queue
    grace_seconds: Annotated[float, Ge(0)] = _LIMITS.grace_seconds
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.sources  # refuses to be empty
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas must be at least replicas, {self.replicas}")

    @property
    def sources(self) -> Sources:
        """The sources that each replica loads."""
        return Sources(
            bundles=self.bundles,
            cuts=self.cuts,
            indexes=self.indexes,
            functions=self.functions,
        )


def application(args: Mapping[str, object]) -> Any:
    """Return the application for `serve deploy`; `args` are the fields of `RayServing`.

    Raises:
        ConfigError: unknown or wrong arguments.
        MissingExtraError: Ray Serve is not installed.
    """
    return deployment(parse(RayServing, args, source="args"))


def deployment(serving: RayServing) -> Any:
    """Return the application for `ray.serve.run`.

    Raises:
        MissingExtraError: Ray Serve is not installed.
    """
    serve = _ray_serve()
    scale: dict[str, Any] = {"num_replicas": serving.replicas}
    if serving.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": serving.replicas,
                "max_replicas": serving.max_replicas,
                "target_ongoing_requests": serving.max_batch,
            }
        }
    return serve.deployment(
        serve.ingress(_builder(serving))(),
        name=_NAME,
        max_ongoing_requests=serving.queue,  # Ray's 5 would leave no batches to gather
        max_constructor_retry_count=_MAX_TRIES,
        graceful_shutdown_timeout_s=serving.grace_seconds,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.gpus},
        **scale,
    ).bind()


@contextlib.contextmanager
def on_ray(
    serving: RayServing,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TlsFiles | None = None,
    cluster: str | None = None,
) -> Iterator[str]:
    """Serve on Ray inside the block, and yield the URL; then finish the requests in flight.

    Args:
        serving: what to serve.
        host: address of each machine's HTTP port.
        port: 0 for any free port.
        tls: certificate and key; None for plain HTTP.
        cluster: address of a Ray cluster, or "auto"; None starts Ray on this machine. If Serve
            runs already, it keeps its host, port and certificate.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        InputError: the port cannot be bound, or Ray or a replica does not start.
    """
    serve = _ray_serve()
    import ray

    with listen(host, port) as bound:  # Ray binds it by itself
        address, free = url_of(bound, tls), bound.getsockname()[1]
    options: dict[str, Any] = {"host": host, "port": free}
    if tls is not None:
        options |= {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    own = {"include_dashboard": False} if cluster is None else {}
    try:
        ray.init(address=cluster, log_to_driver=False, logging_level="error", **own)
    except Exception as error:  # Ray raises Exception itself
        raise InputError(f"Ray does not start: {_last_line(error)}") from error
    try:
        serve.start(http_options=options)
        try:
            serve.run(deployment(serving), name=_NAME, route_prefix="/")
        except RuntimeError as error:
            raise InputError(f"no replica starts on Ray: {_reason(serve)}") from error
        yield address
    finally:
        serve.delete(_NAME)  # waits for the requests in flight
        if cluster is None:  # others may serve on a cluster too
            serve.shutdown()
        ray.shutdown()


def _builder(serving: RayServing) -> Callable[[], App]:
    """Return a function that makes the application in a replica, as `serve.ingress` expects."""

    def build() -> App:
        limit_blas_to_one_thread()
        batches = BatchLimits(max_batch=serving.max_batch, queue=serving.queue)
        limits = ServerLimits(grace_seconds=serving.grace_seconds)
        registry = open_registry(serving.sources, serving.device)
        return App(registry, batches=batches, limits=limits, token=serving.token)

    return build


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(
            f"Ray Serve is missing ({error}): pip install 'edgeclip[ray]'"
        ) from None
    return serve


def _reason(serve: Any) -> str:
    """Return the last line of the replicas' exception, which Ray's own error omits."""
    status = serve.status().applications[_NAME].deployments[_NAME]
    return _last_line(status.message)


def _last_line(text: object) -> str:
    return str(text).strip().rpartition("\n")[2]
