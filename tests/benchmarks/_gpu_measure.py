"""Load all candidates for a case, refuse those that are wrong, let the others take turns."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from _gpu_case import Case, Resident, Runner, Variant
from _gpu_rows import COLUMNS, Column, Row, Timing
from _gpu_torch import REFERENCE
from numpy.typing import NDArray

from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, measure_interleaved
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.errors import first_line

Run = Callable[[NDArray[Any]], object]

_CHECKED_RUN = 3  # what torch compiles runs plainly first, is recorded next, then replayed


@dataclass(slots=True)
class Attempt:
    """What became of a candidate: how it is run for each column, or why it is not.

    Attributes:
        variant: the candidate.
        runs: for the columns in which it is right.
        cosine: the least of all columns.
        wrong: it ran, and gave something else than torch.
        reasons: one for each thing that could not be done.
    """

    variant: Variant
    runs: dict[Column, Run] = field(default_factory=dict)
    cosine: float | None = None
    wrong: bool = False
    reasons: list[str] = field(default_factory=list)


def measure_case(
    case: Case, variants: Sequence[Variant], workload: Workload, *, quick: bool
) -> list[Row]:
    """A row for every candidate, whether it ran or not."""
    attempts = [attempt(case, variant, quick=quick) for variant in variants]
    timings = {column: _take_turns(case, attempts, column, workload) for column in COLUMNS}
    return [
        Row(
            model=case.model,
            tower=case.tower,
            batch=case.batch,
            input_shape=case.values.shape,
            candidate=item.variant.name,
            ours=item.variant.ours,
            host=timings["host"].get(item.variant.name),
            device=timings["device"].get(item.variant.name),
            cosine=item.cosine,
            wrong=item.wrong,
            why="; ".join(item.reasons),
        )
        for item in attempts
    ]


def attempt(case: Case, variant: Variant, *, quick: bool = False) -> Attempt:
    """Load a candidate and compare what it gives, in both columns, with torch in fp32."""
    tried = Attempt(variant)
    if quick and variant.slow:
        tried.reasons.append("left out by --quick")
        return tried
    print(f"{case.model} {case.tower} {case.batch}: {variant.name}", file=sys.stderr, flush=True)
    try:
        runner = variant.open(case)
    except Exception as error:  # each library fails in its own way
        tried.reasons.append(first_line(error))
        return tried
    for column in COLUMNS:
        _try_column(tried, column, case, runner)
    return tried


def _try_column(tried: Attempt, column: Column, case: Case, runner: Runner) -> None:
    try:
        run, found = _PREPARE[column](case, runner)
    except Exception as error:  # as above
        tried.reasons.append(f"{column}: {first_line(error)}")
        return
    cosine, fault = case.judge(found, tried.variant.precision)
    known = [value for value in (tried.cosine, cosine) if value is not None]
    tried.cosine = min(known, default=None)
    if fault:
        tried.wrong = True
        tried.reasons.append(f"{column}: wrong, {fault}")
    else:
        tried.runs[column] = run


def _host(case: Case, runner: Runner) -> tuple[Run, NDArray[Any]]:
    found = [runner.host(case.values) for _ in range(_CHECKED_RUN)]
    return runner.host, found[-1]


def _device(case: Case, runner: Runner) -> tuple[Run, NDArray[Any]]:
    resident: Resident = runner.place(case.values)
    for _ in range(_CHECKED_RUN):
        resident.run()
    return lambda _: resident.run(), resident.fetch()


_PREPARE: dict[Column, Callable[[Case, Runner], tuple[Run, NDArray[Any]]]] = {
    "host": _host,
    "device": _device,
}


def _take_turns(
    case: Case, attempts: Sequence[Attempt], column: Column, workload: Workload
) -> dict[str, Timing]:
    """Time a column; a whole batch is one item of `measure_interleaved`."""
    candidates = list(_candidates(case, attempts, column))
    if not candidates:
        return {}
    names = [item.name for item in candidates]
    found = measure_interleaved(
        candidates,
        workload,
        part=case.tower,
        reference=REFERENCE if REFERENCE in names else None,
    )
    return {
        item.name: Timing(
            ms=item.latency.p50_ms,
            ratio=None if item.ratio is None else item.ratio.ratio,
            settled=item.warm_up.settled,
            contended=item.contended,
        )
        for item in found
    }


def _candidates(
    case: Case, attempts: Sequence[Attempt], column: Column
) -> Iterator[BenchmarkTarget]:
    for item in attempts:
        run = item.runs.get(column)
        if run is not None:
            yield BenchmarkTarget(
                item.variant.name,
                functools.partial(_run_first, run),
                lambda size: case.values[None].repeat(size, 0),
            )


def _run_first(run: Run, batches: NDArray[Any]) -> object:
    return run(batches[0])
