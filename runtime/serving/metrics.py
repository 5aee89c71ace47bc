"""Prometheus metrics of a server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (*(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05), *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0))
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, metrics: "ServerMetrics", model: str) -> None:
        self._requests = metrics.requests
        self._model = model
        self._statuses: dict[int, Counter] = {}
        self._latency = metrics.latency.labels(model)
        self._runs = metrics.runs.labels(model)
        self._run_rows = metrics.rows.labels(model)
        self._queue = metrics.queue.labels(model)

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request by the status of its response, and its latency in seconds."""
        child = self._statuses.get(status)
        if child is None:  # labels() takes a lock and is slow
            child = self._statuses[status] = self._requests.labels(self._model, str(status))
        child.inc()
        self._latency.observe(seconds)

    def count_run(self, rows: int, seconds: float) -> None:
        """Count a run of the model."""
        self._run_rows.observe(rows)
        self._runs.observe(seconds)

    def watch_queue(self, length: Callable[[], float]) -> None:
        """Call `length` for the number of waiting requests whenever metrics are read."""
        self._queue.set_function(length)


class ServerMetrics:
    """The metrics of one server, separate from other servers in the process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "edgeclip_requests",
            "Requests by HTTP status; 499: the client had closed the connection",
            ("model", "status"),
            registry=self._registry,
        )
        self.latency = Histogram(
            "edgeclip_request_seconds",
            "From the head of a request to its response",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.runs = Histogram(
            "edgeclip_run_seconds",
            "One run of a model",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.rows = Histogram(
            "edgeclip_run_rows",
            "Rows in one run of a model",
            ("model",),
            buckets=_ROWS,
            registry=self._registry,
        )
        self.queue = Gauge(
            "edgeclip_waiting",
            "Requests waiting for a model",
            ("model",),
            registry=self._registry,
        )

    def of(self, model: str) -> ModelMetrics:
        """Return the metrics of one model."""
        return ModelMetrics(self, model)

    def page(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
