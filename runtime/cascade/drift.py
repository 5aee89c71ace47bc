"""Watch the escalated share for drift, in a state that outlives the process."""

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from edgeclip.runtime.bundle.files import JsonRecord, lock_file, state_root
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import ConfigError, EdgeClipError, InputError
from edgeclip.runtime.stats.betting import RestartedBets
from edgeclip.runtime.stats.interval import Interval

_log = logging.getLogger(__name__)

# The chance that the true escalated share lies outside the certified interval.
ESCALATED_ERROR = 0.002
_SAVE_EVERY = 100  # queries


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """When the alarm is raised.

    Attributes:
        alpha: without drift, the probability of an alarm, ever and over all restarts, is at most
            this. A part of it, `ESCALATED_ERROR`, is for a certified interval that is wrong.

    Raises:
        ValueError: a value out of bounds.
    """

    alpha: Annotated[float, Gt(ESCALATED_ERROR), Lt(1)] = 0.01

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def limit(self) -> float:
        """The evidence at which the alarm is raised."""
        return 1 / (self.alpha - ESCALATED_ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftState(JsonRecord):
    """The state of a `DriftWatch`: about 2 kB, however long the stream was.

    Attributes:
        certificate: digest of the certificate that it belongs to.
        seen: number of queries so far.
        escalated: number of those that were escalated.
        above, below: capital of the bets that the share is above the certified interval, and
            below it; empty before the first query.
        alarm_at: the number of the query that raised the alarm, from 1; None if none did.

    Raises:
        ValueError: a negative number.
    """

    WHAT: ClassVar[str] = "a drift watch"
    HINT: ClassVar[str] = "delete it to watch anew, which forgets what was seen"

    certificate: str
    seen: Annotated[int, Ge(0)] = 0
    escalated: Annotated[int, Ge(0)] = 0
    above: tuple[float, ...] = ()
    below: tuple[float, ...] = ()
    alarm_at: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self)


def default_state_path(certificate: str) -> Path:
    """Return where the watch of a certificate (by its digest) is kept by default."""
    return state_root() / "drift" / f"{certificate}.json"


class DriftWatch:
    """Test, query by query, whether the escalated share is still inside its certified interval.

    The reference is fixed: one bet that the share is above the upper end and one that it is below
    the lower end, both with restarts (`RestartedBets`); the evidence is their mean. By Ville's
    inequality the alarm is ever raised with probability `DriftRule.alpha` at most, if the queries
    are independent draws, or at least none is likelier escalated than the interval allows, given
    those before it. Once raised, the alarm stays.

    The state is written about every 100 queries, at an alarm, and by `close`, so a killed process
    loses 100 queries at most. Several processes may share a file: each adds its own queries to
    what the file holds, under a lock. Where no file can be locked the last writer wins, which
    loses queries and never an alarm that was written.

    Args:
        certificate: digest of the certificate.
        escalated: the certified interval of the escalated share.
        rule: when to raise the alarm.
        path: the file of the state, read now if it exists; None keeps the state in memory alone.

    Raises:
        InputError: the file is damaged, of another certificate, or cannot be read.
    """

    def __init__(
        self,
        certificate: str,
        escalated: Interval,
        rule: DriftRule | None = None,
        *,
        path: Path | None = None,
    ) -> None:
        self.rule, self.path = rule or DriftRule(), path
        self._certificate, self._escalated = certificate, escalated
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._saver: ThreadPoolExecutor | None = None
        self._unsaved: list[bool] = []
        self._saved = self._read()
        self._restore(self._saved or DriftState(certificate=certificate))

    @property
    def alarm_at(self) -> int | None:
        """The number of the query that raised the alarm, counted from 1; None if none did."""
        return self._alarm_at

    @property
    def seen(self) -> int:
        """Number of queries so far."""
        return self._above.count

    @property
    def escalated_share(self) -> float:
        """Share of these that were escalated by their score; 0 before the first."""
        return self._count / max(1, self.seen)

    @property
    def evidence(self) -> float:
        """What the rule's `limit` is compared with: 1 at the beginning."""
        return (self._above.wealth + self._below.wealth) / 2

    @property
    def state(self) -> DriftState:
        """The state to continue from later, with the same certificate and rule."""
        return DriftState(
            certificate=self._certificate,
            seen=self.seen,
            escalated=self._count,
            above=self._above.capital,
            below=self._below.capital,
            alarm_at=self._alarm_at,
        )

    def update(self, escalated: Iterable[bool]) -> bool:
        """Add the next queries; return whether the alarm is, or was, raised."""
        if self._alarm_at is not None:
            return True
        with self._lock:
            for flag in map(bool, escalated):
                self._step(flag)
                self._unsaved.append(flag)
            crossed = self._alarm_at is not None
            is_due = len(self._unsaved) >= _SAVE_EVERY
        if self.path is None:
            self._unsaved.clear()
        elif crossed:
            self._save_or_warn()  # another process may have queries that speak against it
        elif is_due:
            self._save_later()
        return self._alarm_at is not None

    def save(self) -> None:
        """Write the state, together with what other processes added to the file meanwhile.

        Raises:
            InputError: the file cannot be read or written, or is of another certificate.
        """
        if self.path is None:
            return
        with self._saving, lock_file(self.path):
            kept = self._read()
            with self._lock:
                batch, self._unsaved = self._unsaved, []
                if kept is not None and kept != self._saved:
                    self._restore(kept)
                    for flag in batch if kept.alarm_at is None else ():
                        self._step(flag)
                state = self.state
            try:
                state.save(self.path)
            except (OSError, EdgeClipError) as error:
                with self._lock:
                    self._unsaved = batch + self._unsaved
                raise InputError(f"cannot write {self.path}: {error}") from error
            self._saved = state

    def close(self) -> None:
        """Write the state; the watch may go on."""
        if self._saver is not None:
            self._saver.shutdown()
            self._saver = None
        if self._unsaved:
            self._save_or_warn()

    def _save_later(self) -> None:
        # On a thread of its own: flushing to a disk may take longer than the query.
        if self._saver is None:
            self._saver = ThreadPoolExecutor(1, "edgeclip-drift")
        if not self._saving.locked():
            self._saver.submit(self._save_or_warn)

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except EdgeClipError as error:
            _log.warning("what the drift watch saw is not kept: %s", error)

    def _read(self) -> DriftState | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            found = DriftState.load(self.path)
            RestartedBets(-1.0, found.above)
            RestartedBets(-1.0, found.below)
        except (ConfigError, InputError) as error:
            words = "; ".join(str(error).split("\n  "))
            hint = "" if DriftState.HINT in words else f": {DriftState.HINT}"
            raise InputError(f"{self.path} is damaged: {words}{hint}") from None
        if found.certificate != self._certificate:
            raise InputError(
                f"{self.path} is the drift watch of another certificate: give another file, or "
                f"{DriftState.HINT}"
            )
        return found

    def _restore(self, state: DriftState) -> None:
        low, high = max(0.0, self._escalated.low), min(1.0, self._escalated.high)
        self._above = RestartedBets(-high if high < 1 else 0.0, state.above, state.seen)
        self._below = RestartedBets(low - 1 if low > 0 else 0.0, state.below, state.seen)
        self._low, self._high = low, high
        self._count, self._alarm_at = state.escalated, state.alarm_at

    def _step(self, flag: bool) -> None:
        if self._alarm_at is not None:
            return
        self._above.bet(flag - self._high)
        self._below.bet(self._low - flag)
        self._count += flag
        if self.evidence >= self.rule.limit:
            self._alarm_at = self.seen
