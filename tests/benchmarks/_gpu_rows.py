"""What was found about each candidate: rows for the record, the table that people read, bars."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from _bars import Bar
from _gpu_torch import REFERENCE

from edgeclip.runtime.console import columns
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import Tower

Column = Literal["host", "device"]
COLUMNS: tuple[Column, ...] = get_args(Column)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median time of a batch in ms, and of the paired ratios to the reference."""

    ms: Interval
    ratio: Interval | None
    settled: bool
    contended: bool | None

    def text(self) -> str:
        """One cell of the table."""
        ratio = "" if self.ratio is None else f"  {_bracketed(self.ratio, 3)}"
        marks = "" if self.settled else " unsettled"
        return f"{_bracketed(self.ms, 3)}{ratio}{marks}{' contended' if self.contended else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate in one case.

    Attributes:
        model, tower, batch, input_shape: the case.
        candidate: its name.
        ours: it is one of the runtime's engines.
        host: inputs from host memory, results in host memory; None if it was not timed.
        device: inputs and results in the GPU's memory; None if it was not timed.
        cosine: the least with torch's fp32 embeddings; None if it gave none.
        wrong: it ran, and gave something else than torch.
        why: why it was not timed, or not in both columns.
    """

    model: str
    tower: Tower
    batch: int
    input_shape: tuple[int, ...]
    candidate: str
    ours: bool
    host: Timing | None
    device: Timing | None
    cosine: float | None
    wrong: bool
    why: str


def table(rows: Sequence[Row]) -> str:
    """The rows of one case; candidates that were not timed say why."""
    first = rows[0]
    shape = " x ".join(map(str, first.input_shape))
    cells = [
        ("candidate", "host to host: ms, ratio", "on the device: ms, ratio", "cosine"),
        *(_cells(row) for row in rows if row.host or row.device),
    ]
    title = f"{first.model}, {first.tower} tower, batch {first.batch}, input {shape}"
    lines = [title, columns(cells, left=4)]
    for why in dict.fromkeys(row.why for row in rows if row.why):
        names = ", ".join(row.candidate for row in rows if row.why == why)
        lines.append(f"{names}  not timed: {why}")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, str, str, str]:
    host, device = (item.text() if item else "" for item in (row.host, row.device))
    return row.candidate, host, device, "" if row.cosine is None else f"{row.cosine:.6f}"


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Nothing is wrong; the runtime's engines run, and beat eager torch at batch 1.

    The ratio is that of the engine with the best median, host to host, in the same turns.
    """
    ran = {row.candidate for row in rows if row.ours and row.host}
    return [
        Bar(name="wrong_outputs", value=sum(row.wrong for row in rows), direction="<=", bound=0),
        Bar(name="engines_timed", value=len(ran), direction=">=", bound=1),
        *_best_engines(rows),
    ]


def _best_engines(rows: Sequence[Row]) -> Iterator[Bar]:
    for model, tower in dict.fromkeys((row.model, row.tower) for row in rows):
        ratios = [
            row.host.ratio
            for row in rows
            if (row.model, row.tower, row.batch, row.ours) == (model, tower, 1, True)
            and row.host is not None
            and row.host.ratio is not None
        ]
        if ratios:
            best = min(ratios, key=lambda ratio: ratio.value)
            yield Bar(
                name=f"{model}_{tower}_best_engine_over_{REFERENCE.replace(' ', '_')}",
                value=best.value,
                direction="<=",
                bound=1.0,
                interval=best,
            )


def _bracketed(item: Interval, digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (item.low, item.high))
    return f"{item.value:.{digits}f} [{low}, {high}]"
