"""HTTP client of a model server: every call ends by its deadline, with retries and hedging."""

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from edgeclip.runtime.split.connection import Address
from edgeclip.runtime.split.errors import (
    BreakerOpenError,
    DeadlineExceededError,
    ServerError,
)
from edgeclip.runtime.split.http_exchange import Endpoint, HttpReply, HttpRequest, InferCall
from edgeclip.runtime.split.retries_and_breaker import (
    Attempt,
    Backoff,
    BreakerRules,
    CircuitBreaker,
    Deadline,
    RecentTimes,
    RetryBudget,
    first_answer,
    with_retries,
)
from edgeclip.runtime.wire.messages import (
    SERVER_TIMING_HEADER,
    InferRequest,
    InferResponse,
    server_timing_ms,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MIN_TIMES = 20  # with fewer, a 95th percentile is only the slowest of a few
_MAX_READY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRules:
    """Connections, retries, hedging and circuit breaker of a `Server`.

    Attributes:
        connections: how many calls may be in flight at a time.
        max_reply_bytes: bound of one reply.
        backoff: waiting times between the retries of a call.
        retry_share: extra attempts (retries and hedges) per call, over many calls.
        hedges: whether a call that is slower than 95% of the earlier ones is sent a second time.
        breaker: when to stop calling a server that fails.
        probe_s: timeout of a readiness probe; probes run only while the breaker is open.
    """

    connections: int = 8
    max_reply_bytes: int = 64 << 20
    backoff: Backoff = field(default_factory=Backoff)
    retry_share: float = 0.1
    hedges: bool = True
    breaker: BreakerRules = field(default_factory=BreakerRules)
    probe_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A request that was answered, or given up at its deadline.

    Attributes:
        model: the model that was called.
        rows: pictures, texts or embeddings in the request.
        sent, received: bytes of the bodies.
        ms: from the start of the request to the whole response, or to its end at the deadline.
        server_ms: how long the server worked on it; None if the server does not say.
        timed_out: whether it was given up.
    """

    model: str
    rows: int
    sent: int
    received: int
    ms: float
    server_ms: float | None = None
    timed_out: bool = False


class Server:
    """Client of a model server that speaks the Open Inference Protocol over HTTP.

    Each call ends by its deadline, whatever the server does: calls run on threads of their
    own, and the socket of a call that is given up is shut down. Several threads may call.

    Args:
        url: such as "https://host:8443".
        token: sent as a bearer token.
        fingerprint: SHA-256 of the server's certificate, the only one to trust.
        ca: file of certificates (PEM) to trust in place of the system's.
        rules: see `ClientRules`.
        watch: called with each request that was answered, on the thread that sent it; see
            also `add_observer`.

    Attributes:
        url: see above.
        rules: see above.

    Raises:
        InputError: an address, fingerprint or token that cannot be used. A token is sent only
            where nobody else can read it.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        fingerprint: str | None = None,
        ca: str | None = None,
        rules: ClientRules | None = None,
        watch: Callable[[Transfer], object] = lambda transfer: None,
    ) -> None:
        self.rules = rules or ClientRules()
        self._observers: list[Callable[[Transfer], object]] = [
            lambda transfer: None if transfer.timed_out else watch(transfer)
        ]
        self.url = url
        address = Address(url=url, fingerprint=fingerprint, ca=ca)
        self._endpoint = Endpoint(address, token=token, connections=self.rules.connections)
        self._budget = RetryBudget(self.rules.retry_share)
        self._breaker = CircuitBreaker(self.rules.breaker, half_opens=False, on_open=self._on_open)
        self._times: dict[str, RecentTimes] = {}
        self._closed = threading.Event()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections and let the threads end; later calls raise `ClientBusyError`."""
        self._closed.set()
        self._endpoint.close()

    def add_observer(self, observer: Callable[[Transfer], object]) -> None:
        """Call `observer` with each request that is answered, or given up at its deadline.

        It is called on the thread that ends the request, and must be quick.
        """
        self._observers.append(observer)

    def unavailable_reason(self) -> str | None:
        """Return why a call would be refused at once, such as "breaker open"; None if not."""
        if self._breaker.would_admit():
            return None
        return self._breaker.reason or BreakerOpenError.reason

    def infer(
        self, request: InferRequest, deadline: Deadline, *, idempotent: bool = True
    ) -> InferResponse:
        """Call a model and return its response; arguments and errors as those of `ask`."""
        return self.ask(request, deadline, lambda response: response, idempotent=idempotent)

    def ask(
        self,
        request: InferRequest,
        deadline: Deadline,
        read: Callable[[InferResponse], T],
        *,
        idempotent: bool = True,
    ) -> T:
        """Call a model and return what `read` makes of its response, by `deadline` at the latest.

        Args:
            request: its `deadline_ms` is set to the time left when it is sent. With a
                `space_id`, the response must carry the same.
            deadline: deadline of all attempts together.
            read: raises `BadReplyError` for an unusable response, which counts as a failure of
                the server.
            idempotent: whether the request may be sent twice (retried or hedged).

        Raises:
            ServerError: no usable response; see `errors` for the kinds.
            WireError: the request holds what the protocol cannot carry.
        """
        permit = self._breaker.admit()
        if permit is None:
            message = f"the server at {self.url} failed a moment ago"
            raise BreakerOpenError(message, self._breaker.reason)
        self._budget.deposit()
        began, sizes = time.monotonic(), list[int]()
        try:
            found = self._ask(InferCall(request, deadline, read), idempotent, sizes)
        except ServerError as error:
            if isinstance(error, DeadlineExceededError) and sizes:
                ms = 1e3 * (time.monotonic() - began)
                self._tell(
                    Transfer(
                        model=request.model,
                        rows=request.rows,
                        sent=sizes[0],
                        received=0,
                        ms=ms,
                        timed_out=True,
                    )
                )
            if error.server_works is None:
                permit.unused()
            elif error.server_works:
                permit.succeeded()
            else:
                permit.failed(error.reason, lasting=error.lasting)
            raise
        except BaseException:
            permit.unused()
            raise
        permit.succeeded()
        return found

    def ready(self, deadline: Deadline) -> bool:
        """Return whether the server reports that it is ready (`/v2/health/ready`)."""
        request = HttpRequest(method="GET", path="/v2/health/ready", headers={})
        start = functools.partial(
            self._endpoint.start,
            lambda: request,
            lambda reply: None,
            deadline,
            max_bytes=_MAX_READY_BYTES,
        )
        try:
            first_answer(start, deadline=deadline)
        except ServerError:
            return False
        return True

    def _ask(self, call: InferCall[T], idempotent: bool, sizes: list[int]) -> T:
        """Make a call with hedges and retries; add the size of each request to `sizes`."""

        def start() -> Attempt[T]:
            return self._start(call, sizes)

        deadline = call.deadline
        if not idempotent:
            return first_answer(start, deadline=deadline)
        hedged = functools.partial(
            first_answer,
            start,
            deadline=deadline,
            hedge_after=self._hedge_after(call.request.model),
            may_hedge=self._budget.withdraw,
        )
        return with_retries(
            hedged, deadline=deadline, budget=self._budget, backoff=self.rules.backoff
        )

    def _hedge_after(self, model: str) -> float | None:
        times = self._times.get(model)
        if not self.rules.hedges or times is None or len(times) < _MIN_TIMES:
            return None
        return times.quantile(0.95)

    def _start(self, call: InferCall[T], sizes: list[int]) -> Attempt[T]:
        began, sent = time.monotonic(), 0

        def request() -> HttpRequest:
            nonlocal sent
            made = call.http_request()
            sent = len(made.body or b"")
            sizes.append(sent)
            return made

        def read(reply: HttpReply) -> T:
            model = call.request.model
            found = call.read_reply(reply)
            seconds = time.monotonic() - began
            self._times.setdefault(model, RecentTimes()).add(seconds)
            self._tell(
                Transfer(
                    model=model,
                    rows=call.request.rows,
                    sent=sent,
                    received=len(reply.body),
                    ms=seconds * 1e3,
                    server_ms=server_timing_ms(reply.headers.get(SERVER_TIMING_HEADER)),
                )
            )
            return found

        limit = self.rules.max_reply_bytes
        return self._endpoint.start(request, read, call.deadline, max_bytes=limit)

    def _tell(self, transfer: Transfer) -> None:
        for observer in self._observers:
            observer(transfer)

    def _on_open(self) -> None:
        # The connections that are kept open may lead to a server that is gone.
        self._endpoint.forget_connections()
        threading.Thread(target=self._probe, name="edgeclip-probe", daemon=True).start()

    def _probe(self) -> None:
        """Poll until the server is ready; then let one call through."""
        while not self._closed.wait(self._breaker.open_s()):
            try:
                if self.ready(Deadline.after_ms(self.rules.probe_s * 1e3)):
                    self._breaker.half_open()
                    return
            except Exception:  # this thread must not end before the breaker is half-open
                _log.exception("a readiness probe of %s failed", self.url)
            self._breaker.stay_open()
