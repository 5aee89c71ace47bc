"""What merged patches save, and what they cost: students with and without, and matched tokens.

The students are inherited of the built-in teacher and differ in `merge_after` alone: same data,
steps and losses. R@1 is that of pictures that none was trained on, paired. Their exported image
towers run in turns in one process, with one thread, beside two that drop as many tokens, or half as
many, by matching those that are most alike in each picture (ToMe, Bolya et al. 2023, section 3.2):
these are only timed.
"""

import functools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _bars import Rule, finish, hold, options, say, span
from torch import Tensor, nn

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.data.sources import EmojiSource, relevance_of
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, embed_source
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.export.graph.embedders import TowerGraph, graph_embedder, tower_inputs
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    repeat_rows,
)
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_loss

BARS: dict[str, Rule] = {"time_ratio": ("<=", 0.75, ""), "r1_loss": ("<=", 1.0, "points")}
KEPT_MODELS = ("compress/emoji_teacher",)

PLAIN, HELD = "none", "after layer 1"  # the bars are about this one
MERGED: dict[str, tuple[int, ...]] = {PLAIN: (), HELD: (1,)}
# Of 64 patches, how many go after which layer.
MATCHED: dict[str, dict[int, int]] = {
    "matched, 32 after layer 2": {2: 32},
    "matched, 32 and 16 after layers 1 and 2": {1: 32, 2: 16},
}


@dataclass(frozen=True, slots=True)
class Row:
    """One image tower: R@1 of both directions, and what it loses and takes beside the plain one."""

    merging: str
    r1: float | None
    r1_loss: Interval | None
    time_ratio: Interval | None


def match_tokens(count: int, layer: nn.Module, given: object, hidden: Tensor) -> Tensor:
    """Merge the `count` patches at even places that are most like one at an odd place into it."""
    patches = hidden[:, 1:]
    even, odd = patches[:, ::2], patches[:, 1::2]
    alike = nn.functional.normalize(even, dim=-1) @ nn.functional.normalize(odd, dim=-1).mT
    best, place = alike.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    gone, kept = order[:, :count], order[:, count:]

    def of_even(rows: Tensor) -> Tensor:
        return even.gather(1, rows[..., None].expand(-1, -1, even.shape[-1]))

    into = torch.arange(odd.shape[1])[:, None] == place.gather(1, gone)[:, None]
    share = into.to(odd.dtype)
    mean = (odd + share @ of_even(gone)) / (1 + share.sum(dim=-1, keepdim=True))
    return torch.cat([hidden[:, :1], of_even(kept), mean], dim=1)


def matched(student: DualEncoder, counts: Mapping[int, int]) -> DualEncoder:
    """Let the layers of a new student, counted from 1, drop tokens by matching."""
    layers = student.model.get_submodule("vision_model.encoder.layers")
    for number, count in counts.items():
        layer = layers.get_submodule(str(number - 1))
        layer.register_forward_hook(functools.partial(match_tokens, count))
    return student


def taught(
    teacher: DualEncoder,
    cache: TeacherCache,
    train: EmojiSource,
    merge_after: tuple[int, ...],
    settings: TrainSettings,
    out: Path,
) -> DualEncoder:
    student = new_student(teacher, StudentShape(merge_after=merge_after))
    distill(student, cache, train, loss_weights=LossWeights(), settings=settings, out=out)
    return student


def timed(
    towers: Mapping[str, DualEncoder], test: EmojiSource, folder: Path, *, quick: bool
) -> dict[str, Interval | None]:
    """Export the image towers, and time them in turns: ratios to the plain one."""
    device = replace(load_device("this-machine"), threads=1)
    form = GraphForm.for_device(device)
    targets = []
    for number, (name, dual) in enumerate(towers.items()):
        path = folder / f"{number}.onnx"
        export_tower(dual, "image", path, form)
        embed = graph_embedder(
            TowerGraph("image", "fp32", path, form.pixels), dual.image_spec, device
        )
        (inputs,) = tower_inputs(dual, "image", test, count=8)
        targets.append(BenchmarkTarget(name, embed, repeat_rows(inputs)))
    workload = replace(TUNING_WORKLOAD, repeats=60 if quick else 1000)
    found = measure_interleaved(targets, workload, part="image", reference=PLAIN)
    return {item.name: None if item.ratio is None else item.ratio.ratio for item in found}


def table(rows: Sequence[Row]) -> str:
    cells: list[tuple[str, ...]] = [("merging", "R@1", "points lost", "time ratio")]
    for row in rows:
        r1 = "" if row.r1 is None else f"{row.r1:.3f}"
        ends = ["" if item is None else span(item) for item in (row.r1_loss, row.time_ratio)]
        cells.append((row.merging, r1, *ends))
    return columns(cells)


def main() -> int:
    args = options(__doc__).parse_args()
    scenes, steps, tests = (256, 4, 64) if args.quick else (12_288, 400, 3_000)
    settings = TrainSettings(steps=steps, batch_size=32 if args.quick else 128)
    teacher = DualEncoder.load(built_in_teacher())
    size = teacher.image_spec.size
    train = EmojiSource("train", scenes, size=size)
    # Layer 1 was chosen on the scenes of seed 0, where merging after layer 2 took 0.83 of the time.
    test = EmojiSource("test", tests, size=size, seed=1, distinct=True)
    students: dict[str, DualEncoder] = {}
    hits, losses = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cache = build_cache(teacher, train, folder / "cache")
        for name, after in MERGED.items():
            say(f"patches merged: {name}")
            run = folder / name.replace(" ", "-")
            students[name] = taught(teacher, cache, train, after, settings, run)
            image, text = embed_source(students[name], test)
            hits[name] = pair_ranks(image.numpy(), text.numpy(), relevance_of(test)).hits(1)
            losses[name] = estimate_loss(hits[PLAIN], hits[name]).interval.scaled(100)
        towers = students | {
            name: matched(new_student(teacher, StudentShape()), counts)
            for name, counts in MATCHED.items()
        }
        ratios = timed(towers, test, folder, quick=args.quick)
    rows = [
        Row(name, float(hits[name].mean()) if name in hits else None, losses.get(name), ratio)
        for name, ratio in ratios.items()
    ]
    print(table(rows), flush=True)
    ratio = ratios[HELD]
    assert ratio is not None
    bars = [hold(BARS, "time_ratio", ratio), hold(BARS, "r1_loss", losses[HELD])]
    return finish(bars, args.out, rows=rows, settings=settings)


if __name__ == "__main__":
    sys.exit(main())
