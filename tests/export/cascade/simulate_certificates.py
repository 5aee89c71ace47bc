"""How often certificates and the watch are wrong where the truth is known: shares of repetitions.

Every student here keeps exactly `BOUND` of its teacher's quality, the edge of what a certificate
may not be given for, or a little less; so each certificate is a wrong one.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.cascade.certify import choose_threshold, watched_shares
from edgeclip.export.cascade.ledger import Hypothesis, Ledger, grant
from edgeclip.runtime.cascade.certificate import ESCALATE_ALL, ESCALATE_NONE, PairedOutcomes
from edgeclip.runtime.cascade.drift import DriftRule, DriftWatch
from edgeclip.runtime.cascade.scores import Margin

BOUND = 0.95
GRID = (ESCALATE_ALL, *(1 - np.arange(1, 10) / 10), ESCALATE_NONE)
HYPOTHESIS = Hypothesis(
    student=("s",),
    teacher=("t",),
    precision="int8",
    query="image",
    task="retrieval",
    index_by="teacher",
    score=Margin(),
    bound=BOUND,
    entries="e",
    grid="g",
    cluster_by="none",
    largest=1,
    size=64,
)
_TEACHER = 0.9  # share of its answers that are right
_FIRST_WRONG = 0.5  # at this threshold and below nothing that the student has wrong is escalated


def edge_outcomes(
    rng: np.random.Generator, count: int, *, cluster: int = 1, tied: bool = False
) -> PairedOutcomes:
    """Outcomes of a student that keeps `BOUND` of its teacher's quality below any threshold.

    What the student has wrong has the highest scores, so that escalating helps with nothing but
    the last threshold. Pictures of a cluster have the same outcome.
    """
    groups = -(-count // cluster)
    teacher = rng.random(groups) < _TEACHER
    student = teacher & (rng.random(groups) < BOUND)
    scores = rng.random(groups) / 2 + (teacher & ~student) / 2
    if tied:
        scores = np.round(scores, 1)
    which = np.repeat(np.arange(groups), cluster)[:count]
    return PairedOutcomes(
        scores=scores[which],
        student=student[which],
        escalated=teacher[which],
        teacher=teacher[which],
        clusters=which if cluster > 1 else None,
    )


def wrong_certificates(
    repetitions: int,
    *,
    delta: float = 0.05,
    count: int = 600,
    cluster: int = 1,
    tied: bool = False,
    declared: bool = True,
) -> float:
    """Share of wrong certificates from one test each; `declared`: the clusters are known."""
    wrong = 0
    for seed in range(repetitions):
        outcomes = edge_outcomes(np.random.default_rng(seed), count, cluster=cluster, tied=tied)
        if not declared:
            outcomes = replace(outcomes, clusters=None)
        wrong += _is_wrong(outcomes, delta, None)
    return wrong / repetitions


def wrong_when_raised(
    repetitions: int, *, delta: float = 0.05, counts: Sequence[int] = tuple(range(200, 2001, 200))
) -> float:
    """Share of wrong certificates where the count is raised until one comes, with a ledger."""
    wrong = 0
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        everything, items, ledger = (
            edge_outcomes(rng, max(counts)),
            _items(rng, max(counts)),
            Ledger(),
        )
        for count in counts:
            turn, ledger = grant(ledger, HYPOTHESIS, [(item,) for item in items[:count]])
            if _is_wrong(first(everything, count), turn.part_of(delta), turn.order):
                wrong += 1
                break
    return wrong / repetitions


def wrong_of_several(
    repetitions: int, *, students: int = 10, delta: float = 0.05, count: int = 600
) -> float:
    """Share of test sets on which any of several students gets a certificate, with a ledger."""
    wrong = 0
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        items, ledger = [(item,) for item in _items(rng, count)], Ledger()
        for number in range(students):
            tried = replace(HYPOTHESIS, student=(str(number),))
            turn, ledger = grant(ledger, tried, items)
            if _is_wrong(edge_outcomes(rng, count), turn.part_of(delta), turn.order):
                wrong += 1
                break
    return wrong / repetitions


def false_alarms(
    repetitions: int,
    *,
    starts: int = 30,
    queries: int = 40,
    alpha: float = 0.05,
    tested: int = 2000,
) -> float:
    """Share of devices whose watch ever raises the alarm without drift, over so many starts.

    Each device has a certificate of its own, and a state that is saved at the end of each start.
    """
    memory = Path("/dev/shm")
    alarms = 0
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for seed in range(repetitions):
            rng = np.random.default_rng(seed)
            watched = watched_shares(rng.random(tested // 2), rng.random(tested))
            for _ in range(starts):
                path = Path(folder) / f"{seed}.json"
                watch = DriftWatch(str(seed), watched, DriftRule(alpha=alpha), path=path)
                watch.update(rng.random(queries))
                watch.close()
            alarms += watch.alarm_at is not None
    return alarms / repetitions


def first(outcomes: PairedOutcomes, count: int) -> PairedOutcomes:
    """The first outcomes of a set without clusters."""
    return PairedOutcomes(
        scores=outcomes.scores[:count],
        student=outcomes.student[:count],
        escalated=outcomes.escalated[:count],
        teacher=outcomes.teacher[:count],
    )


def _items(rng: np.random.Generator, count: int) -> list[str]:
    numbers: NDArray[np.uint64] = rng.integers(0, 2**63, count, dtype=np.uint64)
    return [f"{number:032x}" for number in numbers.tolist()]


def _is_wrong(outcomes: PairedOutcomes, delta: float, order: Sequence[int] | None) -> bool:
    found = choose_threshold(outcomes, GRID, bound=BOUND, delta=delta, order=order)
    return found is not None and found.threshold <= _FIRST_WRONG
