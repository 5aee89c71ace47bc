"""How much faster is the int8 that EdgeCLIP chooses than a plain fp32 export, inside all gates?

The plain export is what optimum or torch.onnx give: float32 [N, 3, 224, 224] in, all tokens
through the last layer. The chosen point is what `edgeclip quantize` finds for this machine.
Both run in ONNX Runtime with the same options, in turns, at batch 1, each in its own process.

The towers are the built-in teacher grown to a ViT of 8 M parameters (patch 16) and to a
ViT-B/32, and taught for a few minutes: see `_quantizer_grow.py`, also for what that is not.
They are kept in build/quantizers. A third one, which no bar is about, is the first with large
channels planted behind its LayerNorms, such as ruin naive int8.

The bars were set for a CPU without int8 dot products (VNNI). On one that has them the same command
may choose another point, and "chosen, 7-bit weights" is what the other CPU would have to take. On
which of them figures were made is printed, and `machine.flags` of the JSON file says it.

It takes nearly half an hour on two cores, more on a first run, which grows the towers. `--quick`
neither searches nor grows more than the small one, and teaches nothing: some minutes.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from _bars import Bar, finish, options
from _quantizer_case import FULL, OURS, PLAIN, QUICK, Case, Sizes, chosen_config, open_case, size_mb
from _quantizer_grow import BUILD, VIT_8M, VIT_B32, grown, plant_outliers
from _quantizer_race import QUICK_EFFORT, Effort, race
from _quantizer_rows import Row, gate_bars, print_quality, print_speed, ran_on

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.runtime.device.device_profile import load_device

PLAIN_NAME, FLOAT, CHOSEN, REDUCED = "plain fp32", "our fp32", "chosen", "chosen, 7-bit weights"
BARS = {VIT_8M.name: 1.8, VIT_B32.name: 2.1}
PLANTED = f"{VIT_8M.name}_outliers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All of one model; `why` its int8 is the chosen one."""

    why: str
    rows: tuple[Row, ...]


def measure(case: Case, sizes: Sizes, effort: Effort, threads: Sequence[int]) -> Measured:
    """Choose, judge and time."""
    config, why = chosen_config(case, sizes)
    forms = {PLAIN_NAME: (case.plain, PLAIN), FLOAT: (case.task.graph.path, OURS)}
    forms[CHOSEN] = (case.write(config, "chosen"), OURS)
    if isinstance(config, StaticInt8) and not config.symmetric and not config.reduce_range:
        reduced = replace(config, reduce_range=True)
        forms[REDUCED] = (case.write(reduced, "reduced"), OURS)
    entrants = {name: case.entrant(name, *form) for name, form in forms.items()}
    found = {name: case.embed(item, forms[name][1]) for name, item in entrants.items()}
    judged = [
        Row(
            model=case.name,
            form=name,
            records=() if name == PLAIN_NAME else case.judge(found[name], found[PLAIN_NAME]),
            r1=case.r1(found[name]),
            megabytes=size_mb(item.model),
        )
        for name, item in entrants.items()
    ]
    rows = []
    for count in threads:
        raced = race(list(entrants.values()), effort, threads=count)
        rows += [row.timed(raced, PLAIN_NAME, count) for row in judged]
    return Measured(why=why, rows=tuple(rows))


def bars(rows: Sequence[Row]) -> Iterator[Bar]:
    """The chosen form must be as fast as this, and inside its gates."""
    chosen = [row for row in rows if row.form == CHOSEN and row.model in BARS]
    for row in chosen:
        yield Bar(
            name=f"int8_speedup_{row.model}_{row.threads}_threads",
            value=row.speedup.value,
            direction=">=",
            bound=BARS[row.model],
            interval=row.speedup,
        )
    for row in {row.model: row for row in chosen}.values():
        yield from gate_bars(row)


def models(folder: Path, *, quick: bool) -> Iterator[tuple[str, DualEncoder]]:
    """The towers, each when its turn has come: the large one takes memory."""
    if quick:
        yield VIT_8M.name, grown(replace(VIT_8M, steps=0), folder / "untaught")
        return
    small = grown(VIT_8M, folder)
    yield VIT_8M.name, small
    yield PLANTED, plant_outliers(small)
    del small
    yield VIT_B32.name, grown(VIT_B32, folder)


def main() -> int:
    """Measure, print tables, write the figures."""
    parser = options(__doc__ or "")
    parser.add_argument("--work", type=Path, default=BUILD, help="where towers are kept")
    args = parser.parse_args()
    work, sizes = args.work.resolve(), QUICK if args.quick else FULL
    effort = QUICK_EFFORT if args.quick else Effort(sets=5, rounds=16)
    device = load_device("this-machine")
    threads = sorted({1, device.threads})
    found: list[Measured] = []
    print(ran_on(), flush=True)
    for name, dual in models(work, quick=args.quick):
        with tempfile.TemporaryDirectory() as scratch:
            case = open_case(name, dual, "image", device, sizes, work=work, scratch=Path(scratch))
            found.append(measure(case, sizes, effort, threads))
        print(f"\n{name}; chosen: {found[-1].why}")
        print_speed(found[-1].rows)
        print_quality(found[-1].rows)
        sys.stdout.flush()
    rows = [row for item in found for row in item.rows]
    return finish(list(bars(rows)), args.out, models=[asdict(item) for item in found])


if __name__ == "__main__":
    sys.exit(main())
