"""Peak memory of the cache and of distillation at 10,000 and at 1,000,000 items.

The teacher's embeddings are made up and lie in the cache already, the pictures are a few that
repeat, so what is measured is what the program itself keeps for each item: each size runs in a
process of its own, and its anonymous memory (RssAnon of Linux, without pages of files) is sampled.
The time to sample a step is measured at 10,000 and 1,000,000,000 items, in turns.

Bars: the peak at a million is at most 1.1 times that at ten thousand, and so is the time of a
step's sampling (at most 1.5 times, for a few microseconds are measured).
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _bars import Rule, finish, hold, options, say

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.sampling import Part, Sampling
from edgeclip.compress.data.sources import EmojiSource, Pair
from edgeclip.runtime.bundle.rows import RowFile
from edgeclip.runtime.console import columns

BARS: dict[str, Rule] = {
    "peak memory of cache": ("<=", 1.1, "times"),
    "peak memory of distill": ("<=", 1.1, "times"),
    "sampling at 1e9": ("<=", 1.5, "times"),
}

_PICTURES, _DIM, _CHUNK, _STEPS = 256, 64, 4096, 30


class Repeated:
    """`count` pairs of a few pictures, each with a content and a caption of its own."""

    has_captions = True
    split: Split | None = "train"

    def __init__(self, count: int) -> None:
        self._few = EmojiSource("train", _PICTURES, size=32)
        self._count = count
        self.name = f"{count} repeated scenes"
        self.identity = f"repeated {count}"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Pair:
        return Pair(self._few[index % _PICTURES].image, self.caption(index))

    def caption(self, index: int) -> str:
        return f"scene {index}"

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.caption(index),)

    def content(self, index: int) -> str:
        return f"{index:064x}"


def run(count: int) -> None:
    """Fill a cache with made-up rows, then open it and distil; print the peak of each as JSON."""
    from edgeclip.compress.data.augmentation import Augmentation
    from edgeclip.compress.students.student import StudentShape, new_student
    from edgeclip.compress.teachers.dual_encoder import space_fingerprint
    from edgeclip.compress.teachers.teacher_cache import build_cache
    from edgeclip.compress.train.distill import distill
    from edgeclip.compress.train.losses import LossWeights
    from edgeclip.compress.train.pretrain import TeacherShape, new_teacher
    from edgeclip.compress.train.train_loop import TrainSettings

    shape = TeacherShape(
        image_size=32, image_width=64, image_layers=2, text_width=64, text_layers=2, dim=_DIM
    )
    teacher = new_teacher(shape, seed=0).eval()
    source = Repeated(count)
    with tempfile.TemporaryDirectory() as folder:
        space = {"space": space_fingerprint(teacher)}
        of_images = {**space, "augmentation": asdict(Augmentation()), "version": 2}
        fill(Path(folder, "image.rows"), (1, _DIM), of_images, count, image_key)
        fill(Path(folder, "text.rows"), (_DIM,), space, count, text_key)
        with Peak() as of_cache:
            cache = build_cache(teacher, source, Path(folder), workers=1)
        with Peak() as of_distill:
            distill(
                new_student(teacher, StudentShape()),
                cache,
                source,
                loss_weights=LossWeights(),
                settings=TrainSettings(steps=_STEPS, batch_size=64, checkpoint_seconds=1e9),
                out=Path(folder, "run"),
            )
    print(json.dumps({"cache": of_cache.megabytes, "distill": of_distill.megabytes}))


def image_key(index: int) -> bytes:
    return bytes.fromhex(f"{index:064x}")


def text_key(index: int) -> bytes:
    return hashlib.sha256(f"scene {index}".encode()).digest()


def fill(
    path: Path,
    shape: tuple[int, ...],
    settings: Mapping[str, object],
    count: int,
    key: Callable[[int], bytes],
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((_CHUNK, *shape)).astype(np.float16)
    made = RowFile(path, shape=shape, dtype=np.float16, settings=settings, mend="")
    with closing(made) as file:
        for first in range(0, count, _CHUNK):
            keys = [key(index) for index in range(first, min(first + _CHUNK, count))]
            file.append(keys, rows[: len(keys)])


class Peak:
    """Samples the anonymous memory of this process while the block lasts."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._done = threading.Event()

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
            self.megabytes = max(self.megabytes, int(line.split()[1]) / 1024)
            if self._done.wait(0.02):
                return


def sampling_seconds(quick: bool) -> dict[str, float]:
    """Return the median time to sample a step of 1,024 pairs, at both sizes, in turns."""
    counts = {"1e4": 10**4, "1e9": 10**9}
    made = {name: Sampling([Part(count)]) for name, count in counts.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for step in range(20 if quick else 200):
        for name, sampling in made.items():
            begin = time.perf_counter()
            sampling.items(step * 1024, 1024)
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(own)) for name, own in times.items()}


def main() -> int:
    parser: argparse.ArgumentParser = options(__doc__)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)  # in the processes it starts
    args = parser.parse_args()
    if args.count:
        run(args.count)
        return 0
    large = 100_000 if args.quick else 1_000_000
    peaks = {}
    for count in (10_000, large):
        say(f"{count:,} items")
        command = [sys.executable, __file__, "--count", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[count] = json.loads(done.stdout.splitlines()[-1])
    seconds = sampling_seconds(args.quick)
    cells = [("items", "peak of cache, MB", "of distill, MB")]
    cells += [
        (f"{count:,}", f"{own['cache']:.0f}", f"{own['distill']:.0f}")
        for count, own in peaks.items()
    ]
    print(columns(cells))
    print(
        f"sampling a step of 1024: {1e6 * seconds['1e4']:.0f} us of 1e4 items, "
        f"{1e6 * seconds['1e9']:.0f} us of 1e9"
    )
    bars = [
        hold(BARS, f"peak memory of {name}", peaks[large][name] / peaks[10_000][name])
        for name in ("cache", "distill")
    ]
    bars.append(hold(BARS, "sampling at 1e9", seconds["1e9"] / seconds["1e4"]))
    return finish(bars, args.out, peaks=peaks, seconds=seconds)


if __name__ == "__main__":
    sys.exit(main())
