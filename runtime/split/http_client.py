"""Server: models that another machine serves, asked without ever waiting longer than agreed."""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.split.connection import Address
from edgeclip.runtime.split.errors import BreakerOpenError, ServerError
from edgeclip.runtime.split.http_exchange import Endpoint, HttpReply, HttpRequest, Question
from edgeclip.runtime.split.resilience import (
    Attempt,
    Backoff,
    BreakerRules,
    CircuitBreaker,
    Deadline,
    RetryBudget,
    first_answer,
    with_retries,
)
from edgeclip.runtime.wire.messages import InferRequest, InferResponse


class RecentTimes:
    """Quantiles of the last durations.

    Args:
        keep: how many durations count, at least 1.
    """

    def __init__(self, keep: int = 64) -> None:
        if keep < 1:
            raise InputError(f"keep is {keep}: remember at least 1 duration")
        self._seconds: deque[float] = deque(maxlen=keep)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seconds)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._seconds.append(seconds)

    def quantile(self, share: float) -> float | None:
        """The duration that `share` of the runs did not exceed; None before the first run.

        The nearest rank is taken, so that it is a duration that really occurred.
        """
        with self._lock:
            ordered = sorted(self._seconds)
        if not ordered:
            return None
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


_log = logging.getLogger(__name__)

T = TypeVar("T")

_FEWEST_TIMES = 20  # below that, a 95th percentile is only the slowest of a few
_MOST_OF_READY = 1 << 16  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRules:
    """How a `Server` is dealt with.

    Attributes:
        connections: how many calls may wait for it at a time.
        most_reply_bytes: of one reply.
        backoff: of the retries of one call.
        retry_share: extra attempts (retries and hedges) per call, over many calls.
        hedges: whether a call that is slower than 95% of those before it is made twice.
        breaker: when it is left alone.
        probe_s: how long a readiness probe may take; it runs only while the breaker is open.
    """

    connections: int = 8
    most_reply_bytes: int = 64 << 20
    backoff: Backoff = field(default_factory=Backoff)
    retry_share: float = 0.1
    hedges: bool = True
    breaker: BreakerRules = field(default_factory=BreakerRules)
    probe_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A request that was answered: the bytes of both bodies, and the time that it took."""

    model: str
    sent: int
    received: int
    ms: float


class Server:
    """A server of models that speaks the Open Inference Protocol over HTTP.

    Each call ends by its deadline, whatever the server does: calls run on threads of their
    own, and one that is given up has its socket shut down. Calls may be made from several
    threads.

    Args:
        url: such as "https://host:8443".
        token: sent as a bearer token.
        fingerprint: SHA-256 of the server's certificate, the only one to trust.
        ca: file of certificates (PEM) to trust in place of the system's.
        rules: see `ClientRules`.
        watch: told of each request that was answered, on the thread that made it.

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
        self._watch = watch
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

    def refusal(self) -> str | None:
        """Why a call would not be made at all, such as "breaker open"; None if it would."""
        if self._breaker.would_admit():
            return None
        return self._breaker.reason or BreakerOpenError.reason

    def infer(
        self, request: InferRequest, deadline: Deadline, *, idempotent: bool = True
    ) -> InferResponse:
        """Ask a model; see `ask`."""
        return self.ask(request, deadline, lambda response: response, idempotent=idempotent)

    def ask(
        self,
        request: InferRequest,
        deadline: Deadline,
        read: Callable[[InferResponse], T],
        *,
        idempotent: bool = True,
    ) -> T:
        """Ask a model and return what `read` makes of its reply; over by `deadline` in any case.

        Args:
            request: its `deadline_ms` is set to what is left when it is sent. With a
                `space_id`, the reply must carry the same.
            deadline: of all attempts together.
            read: raises `BadReplyError` for a reply that is of no use, which counts as a
                failure of the server.
            idempotent: whether the request may be sent twice: retried, or hedged.

        Raises:
            ServerError: no usable reply; see `errors` for the kinds.
            WireError: the request holds what the protocol cannot carry.
        """
        permit = self._breaker.admit()
        if permit is None:
            message = f"the server at {self.url} failed a moment ago"
            raise BreakerOpenError(message, self._breaker.reason)
        self._budget.deposit()
        try:
            found = self._ask(Question(request, deadline, read), idempotent)
        except ServerError as error:
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
        """Whether the server says that it is ready (`/v2/health/ready`); False if in doubt."""
        request = HttpRequest(method="GET", path="/v2/health/ready", headers={})
        start = functools.partial(
            self._endpoint.start,
            lambda: request,
            lambda reply: None,
            deadline,
            most_bytes=_MOST_OF_READY,
        )
        try:
            first_answer(start, deadline=deadline)
        except ServerError:
            return False
        return True

    def _ask(self, question: Question[T], idempotent: bool) -> T:
        def start() -> Attempt[T]:
            return self._start(question)

        deadline = question.deadline
        if not idempotent:
            return first_answer(start, deadline=deadline)
        hedged = functools.partial(
            first_answer,
            start,
            deadline=deadline,
            hedge_after=self._hedge_after(question.request.model),
            may_hedge=self._budget.withdraw,
        )
        return with_retries(
            hedged, deadline=deadline, budget=self._budget, backoff=self.rules.backoff
        )

    def _hedge_after(self, model: str) -> float | None:
        times = self._times.get(model)
        if not self.rules.hedges or times is None or len(times) < _FEWEST_TIMES:
            return None
        return times.quantile(0.95)

    def _start(self, question: Question[T]) -> Attempt[T]:
        began, sent = time.monotonic(), 0

        def request() -> HttpRequest:
            nonlocal sent
            made = question.http_request()
            sent = len(made.body or b"")
            return made

        def read(reply: HttpReply) -> T:
            model = question.request.model
            found = question.answer(reply)
            seconds = time.monotonic() - began
            self._times.setdefault(model, RecentTimes()).add(seconds)
            received = len(reply.body)
            self._watch(Transfer(model=model, sent=sent, received=received, ms=seconds * 1e3))
            return found

        most = self.rules.most_reply_bytes
        return self._endpoint.start(request, read, question.deadline, most_bytes=most)

    def _on_open(self) -> None:
        # The ones that are kept lead to a server that may be gone without a word.
        self._endpoint.forget_connections()
        threading.Thread(target=self._probe, name="edgeclip-probe", daemon=True).start()

    def _probe(self) -> None:
        """Ask again and again whether the server is ready; then let one call through."""
        while not self._closed.wait(self._breaker.open_s()):
            try:
                if self.ready(Deadline.after_ms(self.rules.probe_s * 1e3)):
                    self._breaker.half_open()
                    return
            except Exception:  # this thread must not end before the breaker is half-open
                _log.exception("a readiness probe of %s failed", self.url)
            self._breaker.stay_open()
