"""Keep which hypotheses were tried on which queries, so that trying again costs its price.

A certificate that is asked for until it comes is wrong more often than it says. Two rules make
every try count:

- Bets go on where they were: queries that were bet on come first, in their order, and new ones
  after them. By Ville's inequality the promise holds at every count (see `stats.betting`).
- Each further hypothesis on the same queries (another student, score, bound, task, other entries or
  thresholds) has a smaller part of delta: the k-th delta / (k (k + 1)), which sum to delta at most.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from edgeclip.compress.data.clusters import ClusterBy
from edgeclip.compress.data.open_source import split_weight
from edgeclip.compress.data.sources import EMOJI, Source
from edgeclip.runtime.bundle.files import JsonRecord, lock_file, state_root
from edgeclip.runtime.cascade.certificate import Task
from edgeclip.runtime.cascade.read_state import read_state
from edgeclip.runtime.cascade.scores import Score
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.spec import Precision, Tower

_DIGITS = 32  # of a hash in the file: 128 bits

Group = tuple[str, ...]  # the items of a cluster, in the order of their hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """What is tested of a set of queries; any change of it makes another hypothesis.

    Attributes:
        student, teacher: SHA-256 of the files of the towers that embed the queries.
        precision: of the student.
        query, task, index_by: see `QuerySet`.
        score: confidence of the student.
        bound: share of the teacher's quality.
        entries: SHA-256 of what the queries choose from, and of what embedded it.
        grid: SHA-256 of what the thresholds are made from.
        cluster_by: how queries that depend on each other are found.
        largest: size of the largest cluster.
        size: pixels of a picture's side; the same picture has another hash at another size.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    precision: Precision
    query: Tower
    task: Task
    index_by: Literal["teacher", "student"]
    score: Score
    bound: float
    entries: str
    grid: str
    cluster_by: ClusterBy
    largest: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """A hypothesis that was tried.

    Attributes:
        hypothesis: the hypothesis.
        number: k, from 1: the part of delta is 1 / (k (k + 1)).
        groups: the clusters of items that were bet on, in order.
    """

    hypothesis: Hypothesis
    number: Annotated[int, Ge(1)]
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def items(self) -> frozenset[str]:
        """All items that were bet on."""
        return frozenset(item for group in self.groups for item in group)

    def overlaps(self, other: "Try") -> bool:
        """Whether the two may rest on the same pictures."""
        if self.hypothesis.size != other.hypothesis.size:
            return True  # nobody can tell
        return not self.items.isdisjoint(other.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger(JsonRecord):
    """All tries, in the order in which they were first made."""

    WHAT: ClassVar[str] = "a ledger of certificates"
    HINT: ClassVar[str] = (
        "put back a copy of it, or give --ledger another file and queries that were never tried"
    )

    tries: tuple[Try, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the ledger grants a try.

    Attributes:
        number: k of the try; None without a ledger.
        order: for each cluster in the order of bets, its number in what was asked for.
        words: which part of delta it has and why, as a sentence.
    """

    number: int | None
    order: tuple[int, ...]
    words: str

    def part_of(self, delta: float) -> float:
        """Return the part of `delta` that this try has."""
        return delta if self.number is None else delta / (self.number * (self.number + 1))


def default_ledger_path(data: str) -> Path:
    """Return where the tries on `--data` are kept: one ledger for emoji, one for all other data.

    Which queries a try shares with others is found by item, whatever their teacher or path. Only
    at another size nobody can tell, and scenes are kept apart so that they count for no photo.

    Raises:
        ConfigError: see `split_weight`.
    """
    name = "emoji" if split_weight(data)[0] == EMOJI else "pictures"
    return state_root() / "ledgers" / f"{name}.json"


def item_hashes(source: Source) -> tuple[str, ...]:
    """Return a hash of each pair of a source: of its picture's content and its caption.

    Raises:
        InputError: a picture cannot be read.
    """
    seen: dict[str, int] = {}
    found = []
    for index in range(len(source)):
        text = f"{source.content(index)} {source.caption(index)}"
        seen[text] = seen.get(text, 0) + 1  # copies of a pair are pairs of their own
        found.append(hashlib.sha256(f"{text} {seen[text]}".encode("utf-8", "surrogateescape")))
    return tuple(item.hexdigest()[:_DIGITS] for item in found)


def take_turn(path: Path | None, hypothesis: Hypothesis, groups: Sequence[Group]) -> Turn:
    """Enter a try into the ledger, before its outcome is known, and return what it is granted.

    Args:
        path: the ledger, made if it does not exist; None for none: then nothing is remembered, and
            the promise is one of a single try.
        hypothesis: what is tested.
        groups: the clusters of items.

    Raises:
        InputError: the ledger is damaged, or cannot be read or written.
    """
    if path is None:
        fresh = sorted(range(len(groups)), key=lambda at: min(groups[at]))
        return Turn(number=None, order=tuple(fresh), words="No ledger was kept of other tries")
    with lock_file(path):
        ledger = read_state(Ledger, path) or Ledger()
        turn, changed = grant(ledger, hypothesis, groups)
        if changed != ledger:
            changed.save(path)
    return turn


def grant(ledger: Ledger, hypothesis: Hypothesis, groups: Sequence[Group]) -> tuple[Turn, Ledger]:
    """Return what a try is granted, and the ledger with it entered; see `take_turn`."""
    fresh = sorted(range(len(groups)), key=lambda at: min(groups[at]))
    equal = [at for at, made in enumerate(ledger.tries) if made.hypothesis == hypothesis]
    # The least number first: it has the largest part of delta.
    for place in sorted(equal, key=lambda at: ledger.tries[at].number):
        before = ledger.tries[place]
        others = (*ledger.tries[:place], *ledger.tries[place + 1 :])
        found = _continued(before, others, groups, fresh)
        if found is not None:
            turn, made = found
            tries = (*ledger.tries[:place], made, *ledger.tries[place + 1 :])
            return turn, dataclasses.replace(ledger, tries=tries)
    turn, made = _begun(ledger, hypothesis, groups, fresh)
    return turn, dataclasses.replace(ledger, tries=(*ledger.tries, made))


def _continued(
    before: Try, others: Sequence[Try], groups: Sequence[Group], fresh: Sequence[int]
) -> tuple[Turn, Try] | None:
    """Continue the bets of a hypothesis; None where they cannot be.

    That is so where a cluster that was bet on is gone or has other items now, or where the new
    items belong to another try that has the same part of delta.
    """
    numbers = {group: at for at, group in enumerate(groups)}
    done = set(before.groups)
    if not done <= numbers.keys():
        return None
    known = [numbers[group] for group in before.groups]
    rest = [at for at in fresh if groups[at] not in done]
    order = (*known, *rest)
    made = dataclasses.replace(before, groups=tuple(groups[at] for at in order))
    if any(made.overlaps(other) and other.number == made.number for other in others):
        return None
    more = f" with {sum(len(groups[at]) for at in rest):,} more queries" if rest else ""
    words = f"This continues try {made.number} on these queries{more}"
    return Turn(number=made.number, order=order, words=words + _part(made.number)), made


def _begun(
    ledger: Ledger, hypothesis: Hypothesis, groups: Sequence[Group], fresh: Sequence[int]
) -> tuple[Turn, Try]:
    ordered = tuple(groups[at] for at in fresh)
    made = Try(hypothesis=hypothesis, number=1, groups=ordered)
    earlier = [t.number for t in ledger.tries if t.overlaps(made)]
    made = dataclasses.replace(made, number=max(earlier, default=0) + 1)
    words = (
        "This is the first try on these queries"
        if made.number == 1
        else f"This is try {made.number} on these queries: others differed in student, score, "
        "share, task, entries, thresholds or clusters"
    )
    turn = Turn(number=made.number, order=tuple(fresh), words=words + _part(made.number))
    return turn, made


def _part(number: int) -> str:
    return f", so it has 1/{number * (number + 1)} of delta, and the rest is kept for further tries"
