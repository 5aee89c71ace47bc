"""Watch confidence scores for drift, in a state that outlives the process."""

import logging
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, IsFinite, Lt

from edgeclip.runtime.bundle.files import JsonRecord, lock_file, state_root
from edgeclip.runtime.cascade.read_state import read_state
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import EdgeClipError, InputError
from edgeclip.runtime.stats.betting import RestartedBets
from edgeclip.runtime.stats.interval import Interval

_log = logging.getLogger(__name__)

# The chance that any certified share, of low scores or of disagreements, is outside its interval.
WATCHED_ERROR = 0.002
_SAVE_EVERY = 100  # queries
_KEPT_UNSAVED = 1000  # queries, while the file cannot be written


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedShare:
    """A share of low scores that does not change without drift.

    Attributes:
        below: the scores that count are those below this; NaN counts as well.
        share: their share among the queries of the certificate, and its certified interval.
    """

    below: IsFinite[float]
    share: Interval

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """When the alarm is raised.

    Attributes:
        alpha: without drift, the probability of an alarm, ever and over all restarts, is at most
            this. A part of it, `WATCHED_ERROR`, is for a certified interval that is wrong.

    Raises:
        ValueError: a value out of bounds.
    """

    alpha: Annotated[float, Gt(WATCHED_ERROR), Lt(1)] = 0.01

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def limit(self) -> float:
        """The evidence at which the alarm is raised."""
        return 1 / (self.alpha - WATCHED_ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftState(JsonRecord):
    """The state of a `DriftWatch`: about 2 kB, however long the stream was.

    Attributes:
        certificate: digest of the certificate that it belongs to.
        seen: number of queries so far.
        counts: number of those with a score below each mark.
        capital: of the bets that the share of each mark is above its interval, then of those
            that it is below.
        audited: number of audits.
        disagreed: number of those in which student and teacher had different first entries.
        audit_capital: of the bet on these.
        alarm_at: the number of the query that raised the alarm, from 1; None if none did.

    Raises:
        ValueError: a negative number.
    """

    WHAT: ClassVar[str] = "a drift watch"
    HINT: ClassVar[str] = "delete it to watch anew, which forgets what was seen"

    certificate: str
    seen: Annotated[int, Ge(0)] = 0
    counts: tuple[int, ...] = ()
    capital: tuple[tuple[float, ...], ...] = ()
    audited: Annotated[int, Ge(0)] = 0
    disagreed: Annotated[int, Ge(0)] = 0
    audit_capital: tuple[tuple[float, ...], ...] = ()
    alarm_at: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self)


def default_state_path(certificate: str) -> Path:
    """Return where the watch of a certificate (by its digest) is kept by default."""
    return state_root() / "drift" / f"{certificate}.json"


class DriftWatch:
    """Test, query by query, whether shares of low scores are still inside their intervals.

    The reference is fixed: for each of a few marks, one bet that the share of scores below it is
    above the upper end of its interval and one that it is below the lower end, both with restarts
    (`RestartedBets`); the evidence is the mean of all, and of one bet more that audits find student
    and teacher to disagree more often than certified. By Ville's inequality the alarm is ever
    raised with probability `DriftRule.alpha` at most, if the queries are independent draws, or at
    least none is likelier below a mark than its interval allows, given those before it. Once
    raised, the alarm stays.

    The state is written about every 100 queries, at an alarm, and by `close`, so a killed process
    loses 100 queries at most. Several processes may share a file: each adds its own queries to
    what the file holds, under a lock. Where files cannot be locked, of two that write at the same
    moment the last one wins, and a warning says so at the start.

    A file that cannot be written is warned of once, at the start, and tried again every 100
    queries. Meanwhile the watch goes on in memory; if another process writes the file until then,
    the last 1,000 queries are added to what that process saw, and those before them are lost.

    Args:
        certificate: digest of the certificate.
        watched: the certified shares.
        disagreement: the certified share of disagreements among queries that the student answers
            alone; None where none was certified.
        rule: when to raise the alarm.
        path: the file of the state, read now if it exists; None keeps the state in memory alone.

    Raises:
        InputError: the file is damaged, of another certificate, or cannot be read.
    """

    def __init__(
        self,
        certificate: str,
        watched: Sequence[WatchedShare],
        rule: DriftRule | None = None,
        *,
        disagreement: Interval | None = None,
        path: Path | None = None,
    ) -> None:
        self.rule, self.path = rule or DriftRule(), path
        self._certificate, self._watched = certificate, tuple(watched)
        self._disagreement = disagreement
        self._marks = np.array([item.below for item in watched])
        self._lows = np.array([item.share.low for item in watched])
        self._highs = np.array([item.share.high for item in watched])
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._saver: ThreadPoolExecutor | None = None
        self._is_warned, self._is_failing = False, False
        self._unsaved: list[_Event] = []
        self._untried = 0  # events since the file was last to be written
        self._saved = self._read()
        self._restore(self._saved or DriftState(certificate=certificate))
        self._probe()

    @property
    def alarm_at(self) -> int | None:
        """The number of the query that raised the alarm, counted from 1; None if none did."""
        return self._alarm_at

    @property
    def seen(self) -> int:
        """Number of queries so far."""
        return self._bets.count

    @property
    def bets_on_audits(self) -> bool:
        """Whether audits can be evidence: a share of disagreements below 1 was certified."""
        return self._disagreement is not None and self._disagreement.high < 1

    @property
    def evidence(self) -> float:
        """What the rule's `limit` is compared with: 1 at the beginning."""
        return float(np.mean([*self._bets.wealth, *self._audits.wealth]))

    @property
    def finding(self) -> str:
        """The share with the most evidence against it, as a sentence without a full stop."""
        by_mark = self._bets.wealth.reshape(2, -1).max(axis=0)
        if self._disagreement is not None and self._audits.wealth[0] >= by_mark.max(initial=0.0):
            found = self._disagreed / max(1, self._audits.count)
            return (
                f"in {self._audits.count} audits the teacher disagreed with {found:.1%} of the "
                f"student's answers, and when it was certified with "
                f"{self._disagreement.high:.1%} at most"
            )
        at = int(by_mark.argmax())
        mark, found = self._watched[at], self._counts[at] / max(1, self.seen)
        return (
            f"of {self.seen} queries {found:.1%} had a score below {mark.below:.3g}, and when it "
            f"was certified {mark.share.low:.1%} to {mark.share.high:.1%}"
        )

    @property
    def state(self) -> DriftState:
        """The state to continue from later, with the same certificate and rule."""
        return DriftState(
            certificate=self._certificate,
            seen=self.seen,
            counts=tuple(self._counts),
            capital=self._bets.capital if self.seen else (),
            audited=self._audits.count,
            disagreed=self._disagreed,
            audit_capital=self._audits.capital if self._audits.count else (),
            alarm_at=self._alarm_at,
        )

    def update(self, scores: Iterable[float]) -> bool:
        """Add the scores of the next queries; return whether the alarm is, or was, raised."""
        if self._alarm_at is not None:
            return True
        values = np.asarray(list(scores), dtype=np.float64)[:, None]
        return self._add([_Event(tuple(row)) for row in (~(values >= self._marks)).tolist()])

    def update_audits(self, disagreed: Iterable[bool]) -> bool:
        """Add the next audits, likewise: whether the teacher had another first entry in each."""
        return self._add([_Event((bool(flag),), is_audit=True) for flag in disagreed])

    def _add(self, events: Sequence["_Event"]) -> bool:
        if self._alarm_at is not None:
            return True
        with self._lock:
            for event in events:
                self._step(event)
                self._unsaved.append(event)
            self._untried += len(events)
            crossed = self._alarm_at is not None
            is_due = self._untried >= _SAVE_EVERY
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
        with self._saving, self._locked(self.path):
            kept = self._read()
            with self._lock:
                batch, self._unsaved = self._unsaved, []
                if kept is not None and kept != self._saved:
                    self._restore(kept)
                    for event in batch if kept.alarm_at is None else ():
                        self._step(event)
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
            with self._lock:
                self._untried = 0
            self._saver.submit(self._save_or_warn)

    def _save_or_warn(self) -> None:
        try:
            self.save()
            self._is_failing = False
        except EdgeClipError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Say once that the file cannot be written, and keep no more events than a few."""
        with self._lock:
            is_first, self._is_failing = not self._is_failing, True
            del self._unsaved[:-_KEPT_UNSAVED]
        if is_first:
            _log.warning(
                "what the drift watch saw is not kept: %s; it is tried again every %d queries",
                error,
                _SAVE_EVERY,
            )

    def _probe(self) -> None:
        """Warn where the file cannot be written."""
        if self.path is None:
            return
        try:
            with self._locked(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.path.parent):
                    pass
        except EdgeClipError as error:
            self._fail(error)
        except OSError as error:
            self._fail(InputError(f"cannot write {self.path}: {error.strerror}"))

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold the lock of the file; warn once where there is none."""
        with lock_file(path) as is_locked:
            if not is_locked and not self._is_warned:
                self._is_warned = True
                _log.warning(
                    "%s cannot be locked: where several processes watch with it, what one of them "
                    "saw may be lost; give each a file of its own",
                    path,
                )
            yield

    def _read(self) -> DriftState | None:
        if self.path is None:
            return None
        found = read_state(DriftState, self.path, self._check)
        if found is not None and found.certificate != self._certificate:
            raise InputError(
                f"{self.path} is the drift watch of another certificate: give another file, or "
                f"{DriftState.HINT}"
            )
        return found

    def _check(self, state: DriftState) -> None:
        """Raise `InputError` if a state does not fit the certified shares."""
        if state.seen and len(state.counts) != len(self._watched):
            raise InputError("it has another number of marks")
        self._bets_of(state)
        self._audits_of(state)

    def _bets_of(self, state: DriftState) -> RestartedBets:
        """Return the bets that each share is above its interval, then that each is below."""
        ends = [*(-item.share.high for item in self._watched)]
        ends += [item.share.low - 1 for item in self._watched]
        lows = [end if -1 < end < 0 else 0.0 for end in ends]  # no share is beyond an end of 0 or 1
        return RestartedBets(lows, state.capital, state.seen)

    def _audits_of(self, state: DriftState) -> RestartedBets:
        """Return the bet that the share of disagreements is above its interval, if there is one."""
        high = 1.0 if self._disagreement is None else self._disagreement.high
        return RestartedBets([-high if high < 1 else 0.0], state.audit_capital, state.audited)

    def _restore(self, state: DriftState) -> None:
        self._bets, self._alarm_at = self._bets_of(state), state.alarm_at
        self._audits, self._disagreed = self._audits_of(state), state.disagreed
        self._counts = list(state.counts) or [0] * len(self._watched)

    def _step(self, event: "_Event") -> None:
        if self._alarm_at is not None:
            return
        flags = np.array(event.flags, dtype=np.float64)
        if event.is_audit:
            high = 1.0 if self._disagreement is None else self._disagreement.high
            self._audits.bet(flags - high)
            self._disagreed += event.flags[0]
        else:
            self._bets.bet(np.concatenate([flags - self._highs, self._lows - flags]))
            counted = zip(self._counts, event.flags, strict=True)
            self._counts = [count + flag for count, flag in counted]
        if self.evidence >= self.rule.limit:
            self._alarm_at = self.seen


@dataclass(frozen=True, slots=True)
class _Event:
    """A query, with whether its score is below each mark; or an audit, with its disagreement."""

    flags: tuple[bool, ...]
    is_audit: bool = False
