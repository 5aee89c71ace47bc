"""A training step with cached teacher embeddings against the same step with the teacher online.

Two untrained teachers, of 10 and 30 times the student's weights (without those of tables, which
cost no time), at 64 pixels in float32. Both kinds of step take place in one process, in turns, on
batches that were made before, as worker processes do; the cached step reads its embeddings from the
disk within the time. The losses of short runs of both are compared too: the cache keeps float16.

Bars: the cached step is at least 8 times as fast beside the larger teacher and 3 times beside the
smaller one, and the teachers are no larger than that; the losses of a run differ by at most 1%.
"""

import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bars import Bar, Rule, finish, hold, options, say, span
from numpy.typing import NDArray
from torch import Tensor

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.batch_losses import embed_batch
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.distillation_batches import DistillationBatches
from edgeclip.compress.train.loss_terms import TeacherRows, equal_captions
from edgeclip.compress.train.losses import LossWeights, distillation_losses
from edgeclip.compress.train.pretrain import TeacherShape, new_teacher
from edgeclip.compress.train.train_loop import (
    BatchPart,
    Rows,
    TrainSettings,
    TrainTask,
    read_log,
    train,
)
from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, measure_interleaved
from edgeclip.runtime.console import columns
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "size of the teacher of 30 times": ("<=", 30.6, "times"),
    "size of the teacher of 10 times": ("<=", 10.2, "times"),
    "cached step beside a teacher of 30 times": (">=", 8.0, "times"),
    "cached step beside a teacher of 10 times": (">=", 3.0, "times"),
    "losses apart, teacher of * times": ("<=", 1.0, "%"),
}

_BATCH = 32
_SMALL = TeacherShape(
    image_width=320, image_layers=11, text_width=320, text_layers=11, dim=128, patch_size=16
)
_LARGE = replace(_SMALL, image_width=640, text_width=640, image_layers=8, text_layers=8)
_STUDENT = StudentShape(image_heads=3, image_layers=3, text_heads=3, text_layers=3)
_SETTINGS = TrainSettings(
    steps=20, batch_size=_BATCH, warmup_steps=5, compute="fp32", checkpoint_seconds=1e9, workers=0
)


def encoder_weights(dual: DualEncoder) -> int:
    """Count the weights but those of tables, which cost no time."""
    return sum(value.numel() for name, value in dual.named_parameters() if "embedding" not in name)


class Case:
    """A teacher, its student and their batches."""

    def __init__(self, shape: TeacherShape, folder: Path) -> None:
        self.teacher = new_teacher(shape, seed=0).eval()
        self.source = EmojiSource("train", 1024, size=shape.image_size)
        self.cache: TeacherCache = build_cache(self.teacher, self.source, folder, workers=0)
        sampling = Sampling(parts_of(self.source), held_out=0)
        self.student = new_student(self.teacher, _STUDENT)
        self.times = encoder_weights(self.teacher) / encoder_weights(self.student)
        self.batches = DistillationBatches(
            self.student, [self.cache], self.source, sampling, _SETTINGS
        )

    def online(self, student: DualEncoder, inputs: Rows) -> Rows:
        """Embed a batch by the student, and by the teacher without gradients."""
        with torch.no_grad():
            theirs = embed_batch(self.teacher, inputs)
        own = {f"teacher {name}": rows for name, rows in theirs.items()}
        return {**embed_batch(student, inputs), **own}

    def losses(self, found: Rows, targets: Rows) -> dict[str, Tensor]:
        teacher = TeacherRows(
            image=found.get("teacher image", targets["image 0"]).detach(),
            text=found.get("teacher text", targets["text 0"]).detach(),
            scale=self.cache.settings.logit_scale,
        )
        return distillation_losses(
            LossWeights(),
            image=found["image"],
            text=found["text"],
            teachers=[teacher],
            same=equal_captions(targets["caption"]),
        )

    def step(self, name: str, *, online: bool) -> BenchmarkTarget:
        """A training step: both passes, AdamW, and reading what the cache holds."""
        student = new_student(self.teacher, _STUDENT).train()
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
        embed = partial(self.online, student) if online else partial(embed_batch, student)
        count = iter(range(10**9))
        made = [self.batches(BatchPart(number, 0, 1)) for number in range(8)]

        def run(_: NDArray[Any]) -> None:
            number = next(count) % len(made)
            batch = made[number]
            if not online:
                indices = self.batches.items(BatchPart(number, 0, 1))[0].tolist()
                self.cache.image(indices)
                self.cache.text(indices)
            optimizer.zero_grad(set_to_none=True)
            self.losses(embed(batch.inputs), batch.targets)["total"].backward()
            optimizer.step()

        return BenchmarkTarget(name, run, lambda size: np.zeros((size, 1)))

    def curves(self, folder: Path) -> tuple[list[float], list[float]]:
        """Return the losses of a run with the cache, and of one with the teacher online."""
        cached, student = (new_student(self.teacher, _STUDENT) for _ in range(2))
        distill(
            cached,
            self.cache,
            self.source,
            loss_weights=LossWeights(),
            settings=_SETTINGS,
            out=folder / "cached",
            held_out=0,
        )
        task = TrainTask(
            title="online",
            module=student,
            batch=self.batches,
            embed=partial(self.online, student),
            losses=self.losses,
            identity="online",
        )
        train(task, _SETTINGS, folder / "online")
        first, second = (
            [line["total"] for line in read_log(folder / name / "log.jsonl")]
            for name in ("cached", "online")
        )
        return first, second


def speedup(case: Case, quick: bool) -> Interval:
    amount = replace(TUNING_WORKLOAD, min_warmup_runs=1, max_warmup_seconds=1e-3)
    amount = replace(amount, repeats=6 if quick else 40)
    steps = [case.step("cached", online=False), case.step("online", online=True)]
    online = measure_interleaved(steps, amount, part="image", reference="cached")[1]
    assert online.ratio is not None
    return online.ratio.ratio


def main() -> int:
    args = options(__doc__).parse_args()
    torch.manual_seed(0)
    bars: list[Bar] = []
    cells = [("teacher", "times the student", "online / cached", "losses differ by")]
    rows = []
    for name, shape in (("30", _LARGE), ("10", _SMALL)):
        say(f"a teacher of about {name} times the student")
        with tempfile.TemporaryDirectory() as folder:
            case = Case(shape, Path(folder) / "cache")
            ratio = speedup(case, args.quick)
            cached, online = case.curves(Path(folder))
        apart = max(abs(a - b) / b for a, b in zip(cached, online, strict=True))
        cells.append((name, f"{case.times:.1f}", span(ratio), f"{apart:.2%}"))
        rows.append({"teacher": name, "times": case.times, "cached": cached, "online": online})
        bars += [
            hold(BARS, f"size of the teacher of {name} times", case.times),
            hold(BARS, f"cached step beside a teacher of {name} times", ratio),
            hold(BARS, f"losses apart, teacher of {name} times", 100 * apart),
        ]
    print(columns(cells))
    return finish(bars, args.out, threads=torch.get_num_threads(), rows=rows)


if __name__ == "__main__":
    sys.exit(main())
