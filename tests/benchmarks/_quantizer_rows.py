"""What the benchmarks of quantization say of one form of a tower: a row, its bars, its lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from _bars import Bar
from _quantizer_race import Raced

from edgeclip.runtime.bundle.manifest import GateRecord
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.quality.intervals import Interval

_MEAN, _P1 = "mean cosine", "1st-percentile cosine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One form of a tower: how good, how large, and how fast with so many threads.

    Attributes:
        model: which tower of which model.
        form: how it was made.
        records: its gates on the test inputs; none of what is fp32 or did not run.
        r1: of the test pairs, the other tower being in fp32.
        megabytes: of its files.
        threads, ms, ratio: milliseconds of a run, and the time divided by that of the plain
            fp32 export, with so many threads.
        contended: other programs took the processor meanwhile.
        why: it is not there.
    """

    model: str
    form: str
    records: tuple[GateRecord, ...] = ()
    r1: Interval | None = None
    megabytes: float | None = None
    threads: int = 0
    ms: Interval | None = None
    ratio: Interval | None = None
    contended: bool | None = None
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether it runs, and is inside all gates."""
        return not self.why and all(record.passed for record in self.records)

    @property
    def speedup(self) -> Interval:
        """How many times as fast as the plain export; it must have been timed."""
        assert self.ratio is not None
        return Interval(1 / self.ratio.value, 1 / self.ratio.high, 1 / self.ratio.low)

    def timed(self, raced: Raced, reference: str, threads: int) -> "Row":
        """The same with its times."""
        return replace(
            self,
            threads=threads,
            ms=raced.ms(self.form),
            ratio=raced.ratio(self.form, reference),
            contended=raced.contended,
        )


def gate_bars(row: Row) -> Iterator[Bar]:
    """A bar for each gate of a row; one that is missed, if it was not judged."""
    if not row.records:
        yield Bar(name=f"{row.model}_judged", value=0, direction=">=", bound=1)
    for item in row.records:
        words = item.name.replace(",", "").replace("@", "").replace("-", "_").split()
        yield Bar(
            name="_".join((row.model, *words)),
            value=item.value,
            direction=item.direction,
            bound=item.bound,
            unit=item.unit,
            interval=Interval(item.value, item.low, item.high),
        )


def print_speed(rows: Sequence[Row]) -> None:
    """Times, sizes and speed-ups."""
    print(f"{'form':<34}{'threads':>7}{'ms':>9}{'MB':>8}{'of plain':>10}  {'interval':<17}faster")
    for row in rows:
        if row.ms is None or row.ratio is None:
            print(f"{row.form:<34}{row.why}")
            continue
        size = "" if row.megabytes is None else f"{row.megabytes:.1f}"
        print(
            f"{row.form:<34}{row.threads:>7}{row.ms.value:>9.2f}{size:>8}{row.ratio.value:>10.3f}"
            f"  {span(row.ratio, 3):<17}{row.speedup.value:.2f}x"
            f"{'  contended' if row.contended else ''}"
        )


def print_quality(rows: Sequence[Row]) -> None:
    """Cosines, R@1 and missed gates, of each form once."""
    print(f"{'form':<34}{'mean cosine':<30}{'1st percentile':<28}{'R@1':<22}gates")
    for form in dict.fromkeys(row.form for row in rows if row.r1 is not None):
        row = next(item for item in rows if item.form == form)
        cells = [_cell(row, name) for name in (_MEAN, _P1)]
        r1 = "" if row.r1 is None else f"{100 * row.r1.value:.1f}% {span(_percent(row.r1), 1)}"
        missed = [record for record in row.records if not record.passed]
        told = ", ".join(f"{item.name} {item.value:.4g}" for item in missed)
        verdict = f"missed: {told}" if missed else "inside" if row.records else ""
        print(f"{form:<34}{cells[0]:<30}{cells[1]:<28}{r1:<22}{verdict}")


def ran_on() -> str:
    """Which machine this is, and whether it has what makes 8-bit products fast and exact."""
    machine, device = detect_machine(), load_device(THIS_MACHINE)
    without = "with" if device.vnni else "without"
    return f"on {machine.cpu}, {machine.cores} cores, {without} int8 dot products (VNNI)"


def span(interval: Interval, digits: int) -> str:
    """`[low, high]`."""
    return f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _cell(row: Row, name: str) -> str:
    for item in row.records:
        if item.name == name:
            ends = Interval(item.value, item.low, item.high)
            return f"{item.value:.5f} {span(ends, 5)}"
    return ""


def _percent(share: Interval) -> Interval:
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)
