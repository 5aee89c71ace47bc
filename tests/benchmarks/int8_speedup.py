"""How much faster is the int8 that EdgeCLIP chooses than a plain fp32 export, inside all gates?

The plain export is what optimum or torch.onnx give: float32 [N, 3, 224, 224] in, all tokens
through the last layer. The chosen point is what `edgeclip quantize` finds for this machine.
Both run in ONNX Runtime with the same options, in turns, at batch 1, each in its own process.

The towers are the built-in teacher grown to a ViT of 8 M parameters (patch 16) and to a
ViT-B/32, and taught for a few minutes: see `_quantizer_models.py`. They are kept in
build/quantizers. A third one, which no bar is about, is the first with outliers planted.

The bars were set for a CPU without int8 dot products (VNNI); "chosen, 7-bit weights" is what that
would have to take. It takes nearly half an hour on two cores, more on a first run. `--quick`
neither searches nor grows more than the small one, and teaches nothing: some minutes.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from _bars import Bar, Rule, finish, hold, options
from _quantizer_case import FULL, OURS, QUICK, Contest, Row, Sizes, gate_bars, ran_on, table
from _quantizer_models import VIT_8M, VIT_B32, WORK, grown, plant_outliers

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "int8_speedup_vit_8m_*": (">=", 1.8, ""),
    "int8_speedup_vit_b32_*": (">=", 2.1, ""),
    "*_usable_embeddings": (">=", 1.0, "share"),
    "*_mean_cosine": (">=", 0.995, "cosine"),
    "*_1st_percentile_cosine": (">=", 0.98, "cosine"),
    "*_zero_shot_top_1_loss": ("<=", 0.5, "points"),
    "*_R1_loss_*": ("<=", 1.0, "points"),
}
KEPT_MODELS = ("compress/emoji_teacher",)

CHOSEN, REDUCED = "chosen", "chosen, 7-bit weights"
_HELD = (VIT_8M.name, VIT_B32.name)


def measure(name: str, dual: DualEncoder, sizes: Sizes) -> tuple[str, list[Row]]:
    """Why its int8 is the chosen one, and all rows of a model, with one thread and with all."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        contest = Contest(name, dual, "image", sizes, Path(scratch))
        config, why = contest.enter_chosen(CHOSEN)
        if isinstance(config, StaticInt8) and not config.symmetric and not config.reduce_range:
            reduced = replace(config, reduce_range=True)
            contest.enter(REDUCED, contest.write(reduced, "reduced"), OURS)
        for threads in sorted({1, load_device("this-machine").threads}):
            rows += contest.race(threads)[1]
    return why, rows


def bars(rows: Sequence[Row]) -> Iterator[Bar]:
    chosen = [row for row in rows if row.form == CHOSEN and row.model in _HELD]
    for row in chosen:
        assert row.ratio is not None, row.why
        faster = Interval(1 / row.ratio.value, 1 / row.ratio.high, 1 / row.ratio.low)
        name = f"int8_speedup_{row.model}_{row.threads}_threads"
        yield hold(BARS, name, faster)
    for model, row in {row.model: row for row in chosen}.items():
        yield from gate_bars(model, row.records)


def models(*, quick: bool) -> Iterator[tuple[str, DualEncoder]]:
    """The towers, each when its turn has come: the large one takes memory."""
    if quick:
        yield VIT_8M.name, grown(replace(VIT_8M, steps=0), WORK / "untaught")
        return
    small = grown(VIT_8M)
    yield VIT_8M.name, small
    yield f"{VIT_8M.name}_outliers", plant_outliers(small)
    del small
    yield VIT_B32.name, grown(VIT_B32)


def main() -> int:
    args = options(__doc__).parse_args()
    found: list[dict[str, object]] = []
    everything: list[Row] = []
    print(ran_on(), flush=True)
    for name, dual in models(quick=args.quick):
        why, rows = measure(name, dual, QUICK if args.quick else FULL)
        print(f"\n{name}; chosen: {why}\n{table(rows)}", flush=True)
        found.append({"why": why, "rows": rows})
        everything += rows
    return finish([*bars(everything)], args.out, models=found)


if __name__ == "__main__":
    sys.exit(main())
