"""A run that ends by SIGKILL when the given number of pictures has been read.

Tests start it as a process of its own:
`python killed_run.py cache|fp32|bf16 TEACHER PICTURES OUT CACHE READS`.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from edgeclip.compress.compute import ComputeType
from edgeclip.compress.data.sources import FolderSource, Pair
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings


class DeadlySource(FolderSource):
    """A folder whose next picture, after `reads` of them, kills the process."""

    def __init__(self, folder: Path, reads: int) -> None:
        super().__init__(folder)
        self._reads = reads

    def __getitem__(self, index: int) -> Pair:
        if self._reads == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._reads -= 1
        return super().__getitem__(index)


def main(what: str, teacher_folder: str, pictures: str, out: str, cache: str, reads: str) -> None:
    torch.set_num_threads(1)
    teacher = DualEncoder.load(teacher_folder)
    source = DeadlySource(Path(pictures), int(reads))
    if what == "cache":
        build_cache(teacher, source, Path(cache), workers=0)
        return
    compute: ComputeType = "bf16" if what == "bf16" else "fp32"
    shape = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
    distill(
        new_student(teacher, shape),
        build_cache(teacher, source, Path(cache), workers=0),
        source,
        loss_weights=LossWeights(),
        settings=TrainSettings(
            steps=12,
            batch_size=8,
            warmup_steps=3,
            compute=compute,
            checkpoint_seconds=1e-6,
            workers=0,
        ),
        out=Path(out),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
