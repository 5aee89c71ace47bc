"""Whether distillation keeps a student in the space of a teacher that does not know the pictures.

What stands for photographs are dead leaves (Lee, Mumford, Huang 2001): shapes that cover each
other, their sizes by a power law, under noise with the spectrum of photographs. They share the
statistics of photographs, and image models learn from them (Baradad et al. 2021). Their captions
are everyday sentences drawn by chance, so the built-in teacher knows nothing of the pairs.
EmojiScenes, which it knows, are the other data.

On both, the same student learns by the default losses, by those of before (one-hot targets between
the student and the other tower of the teacher, and unweighted affinity), and by the feature loss
alone. What each reaches is measured on pairs that none has seen.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _bars import Bar, at_least, at_most, finish, options, say
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.compute import full_precision
from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.sources import EmojiSource, Pair, Source, relevance_of
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, embed_source
from edgeclip.compress.train.distill import DistillationBatch, DistillationBatches
from edgeclip.compress.train.held_out import IMAGE_COSINE, TEXT_COSINE, HeldOut, split_rows
from edgeclip.compress.train.losses import (
    LossWeights,
    distillation_losses,
    equal_rows,
    feature_loss,
)
from edgeclip.compress.train.train_loop import TrainSettings, TrainTask, read_log, train
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.quality.intervals import Interval, bootstrap, bootstrap_difference
from edgeclip.runtime.quality.retrieval import pair_ranks

_WORDS = {
    "who": "a man,two women,a child,an old dog,several people,a cyclist,the girl in red,a crowd",
    "does": "walks along,looks at,sits beside,jumps over,takes a picture of,waits near,runs past",
    "what": "the beach,a parked car,some trees,a market stall,the river,a wooden fence,a tall wall",
    "when": "at night,in the rain,on a sunny day,in winter,early in the morning,after work",
}
_SENTENCE = [tuple(words.split(",")) for words in _WORDS.values()]


class DeadLeaves:
    """Stand-ins for photographs: `count` dead-leaves pictures with captions drawn by chance."""

    has_captions = True

    def __init__(self, count: int, *, size: int, seed: int, split: Split = "train") -> None:
        self.split: Split | None = split
        self.name = f"{count} dead leaves"
        self.identity = f"dead-leaves:{count}:{size}:{seed}"
        self._pictures = [
            _dead_leaves(np.random.default_rng((seed, i)), size) for i in range(count)
        ]
        self._captions = [_sentence(np.random.default_rng((seed, i, 1))) for i in range(count)]

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self._pictures[index], self._captions[index])

    def caption(self, index: int) -> str:
        return self._captions[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._captions[index],)

    def content(self, index: int) -> str:
        return hashlib.sha256(self._pictures[index].tobytes()).hexdigest()


def _sentence(rng: np.random.Generator) -> str:
    return " ".join(str(rng.choice(words)) for words in _SENTENCE)


def _dead_leaves(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw discs, boxes and triangles from the back to the front; radii by r^-3."""
    scale = 2 * size
    picture = Image.new("RGB", (scale, scale), _colour(rng))
    draw = ImageDraw.Draw(picture)
    low, high = 0.02 * scale, 0.5 * scale
    for chance in rng.uniform(size=80):
        radius = (low**-2 + chance * (high**-2 - low**-2)) ** -0.5
        x, y = rng.uniform(0, scale, 2)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 4 if kind == 1 else 3))
            corners = [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]
            draw.polygon(corners, fill=_colour(rng))
    small = picture.resize((size, size), Image.Resampling.BICUBIC)
    noisy = np.asarray(small, dtype=np.float64) + 24 * _pink_noise(rng, size)[..., None]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """A muted colour: most of its variance is brightness, as in photographs."""
    red, green, blue = (128 + 60 * rng.normal() + 22 * rng.normal(size=3)).clip(0, 255)
    return int(red), int(green), int(blue)


def _pink_noise(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Noise of unit variance whose amplitude falls as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(size, size))) / frequency
    noise = np.fft.irfft2(spectrum, s=(size, size))
    unit: NDArray[np.float64] = noise / noise.std()
    return unit


Losses = Callable[[DistillationBatch, Tensor, Tensor, float], dict[str, Tensor]]


def by_weights(
    weights: LossWeights, batch: DistillationBatch, image: Tensor, text: Tensor, scale: float
) -> dict[str, Tensor]:
    """The losses of `edgeclip distill`."""
    assert batch.ids is not None
    assert batch.teacher_text is not None
    return distillation_losses(
        weights,
        image=image,
        text=text,
        teacher_image=batch.teacher_image,
        teacher_text=batch.teacher_text,
        scale=scale,
        same=equal_rows(batch.ids),
    )


def one_hot(
    batch: DistillationBatch, image: Tensor, text: Tensor, scale: float
) -> dict[str, Tensor]:
    """The defaults of before: affinity (TinyCLIP, eq. 3), feature, interactive (CLIP-KD, eq. 8)."""
    assert batch.teacher_text is not None
    teacher_image, teacher_text = batch.teacher_image, batch.teacher_text
    ours, theirs = scale * image @ text.T, scale * teacher_image @ teacher_text.T
    own = torch.arange(len(image), device=image.device)
    affinity = (_kl(ours, theirs) + _kl(ours.T, theirs.T)) / 2
    feature = (feature_loss(image, teacher_image) + feature_loss(text, teacher_text)) / 2
    images = F.cross_entropy(scale * image @ teacher_text.T, own)
    texts = F.cross_entropy(scale * text @ teacher_image.T, own)
    return {"total": affinity + feature + (images + texts) / 2}


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    rows = F.log_softmax(ours, dim=-1), F.log_softmax(theirs, dim=-1)
    return F.kl_div(*rows, reduction="batchmean", log_target=True)


ALL_LOSSES: dict[str, Losses] = {
    "defaults": partial(by_weights, LossWeights()),
    "one-hot": one_hot,
    "feature alone": partial(by_weights, LossWeights(affinity=0, interactive=0)),
}


class Sizes(NamedTuple):
    """How much is trained and measured."""

    pictures: int = 4096
    test: int = 500
    steps: int = 300
    batch_size: int = 64


QUICK = Sizes(pictures=1024, test=200, steps=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a student reached with some losses on some data, on pairs that it never saw.

    Attributes:
        held_out: step, loss, and cosine (mean of both towers) of each validation of the run.
        image_cosine, text_cosine: mean cosine to the teacher's embeddings after the last step.
        r1, teacher_r1: R@1, mean of both directions.
        hits: of each test pair, for paired comparisons; not written.
    """

    data: str
    losses: str
    held_out: list[tuple[float, float, float]]
    image_cosine: Interval
    text_cosine: Interval
    r1: Interval
    teacher_r1: Interval
    hits: NDArray[np.float64]

    @property
    def cosine(self) -> float:
        """The mean of both towers."""
        return (self.image_cosine.value + self.text_cosine.value) / 2

    def row(self) -> str:
        """A line of the table."""
        first, last = self.held_out[0], self.held_out[-1]
        return (
            f"{self.data:<12} {self.losses:<14} {first[1]:>7.2f} {last[1]:>7.2f} {first[2]:>7.3f} "
            f"{last[2]:>7.3f} {self.image_cosine.value:>7.3f} {self.text_cosine.value:>7.3f} "
            f"{self.r1.value:>7.1%} {self.teacher_r1.value:>7.1%}"
        )


HEAD = (
    f"{'data':<12} {'losses':<14} {'loss':>7} {'':>7} {'held-out cosine':>15} {'image':>7} "
    f"{'text':>7} {'R@1':>7} {'teacher':>7}"
)


def reach(
    teacher: DualEncoder,
    cache: TeacherCache,
    source: Source,
    test: Source,
    data: str,
    losses: str,
    sizes: Sizes,
) -> Reached:
    """Distil a student as `edgeclip distill` does, but keep the last step, not the best."""
    student = new_student(teacher, StudentShape())
    settings = TrainSettings(steps=sizes.steps, batch_size=sizes.batch_size)
    split = split_rows(len(source))
    scale = cache.settings.logit_scale

    def compute(batch: DistillationBatch) -> dict[str, Tensor]:
        assert batch.ids is not None
        image, text = student.embed_image(batch.pixels), student.embed_text(batch.ids)
        with full_precision(student.device):
            return ALL_LOSSES[losses](batch, image, text, scale)

    held_out = HeldOut(student, cache, source, split.held_out)
    task = TrainTask(
        title=f"{data}, {losses}",
        module=student,
        batch=DistillationBatches(student, cache, source, settings, rows=split.train),
        losses=compute,
        identity=losses,
        validate=lambda: replace(held_out(), score=0.0),  # of equals the last step is kept
        validate_every=max(1, sizes.steps // 10),
    )
    with tempfile.TemporaryDirectory() as folder:
        train(task, settings, Path(folder))
        log = read_log(Path(folder) / "log.jsonl")
    ours, theirs = ([part.numpy() for part in embed_source(model, test)]
                    for model in (student, teacher))  # fmt: skip
    relevance = relevance_of(test)
    hits, teacher_hits = (
        pair_ranks(image, text, relevance).hits(1) for image, text in (ours, theirs)
    )
    return Reached(
        data=data,
        losses=losses,
        held_out=[
            (line["step"], line["total"], (line[IMAGE_COSINE] + line[TEXT_COSINE]) / 2)
            for line in log
            if IMAGE_COSINE in line
        ],
        image_cosine=bootstrap(cosines(ours[0], theirs[0])),
        text_cosine=bootstrap(cosines(ours[1], theirs[1])),
        r1=bootstrap(hits),
        teacher_r1=bootstrap(teacher_hits),
        hits=hits,
    )


def bars(found: Sequence[Reached]) -> list[Bar]:
    """What the defaults must hold, and that the benchmark sees what they were changed for."""
    unknown, known = (
        {item.losses: item for item in found if item.data == data}
        for data in ("dead leaves", "emoji")
    )
    now, before, alone = (unknown[name] for name in ("defaults", "one-hot", "feature alone"))
    gained = bootstrap_difference(100 * known["defaults"].hits, 100 * known["one-hot"].hits)
    grown = now.held_out[-1][2] - now.held_out[0][2]
    return [
        at_least("unknown_cosine_gained_in_training", grown, 0.2),
        at_most("unknown_cosine_below_feature_alone", alone.cosine - now.cosine, 0.02),
        at_least("unknown_cosine_above_one_hot", now.cosine - before.cosine, 0.2),
        at_least("emoji_r1_above_one_hot", gained, -1.0, "points"),
    ]


def main() -> int:
    """Distil, measure, print the table and the bars."""
    args = options(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    teacher = DualEncoder.load(built_in_teacher())
    size = teacher.image_spec.size
    sources: dict[str, tuple[Source, Source]] = {
        "dead leaves": (
            DeadLeaves(sizes.pictures, size=size, seed=0),
            DeadLeaves(sizes.test, size=size, seed=1, split="test"),
        ),
        "emoji": (
            EmojiSource("train", sizes.pictures, size=size),
            EmojiSource("test", sizes.test, size=size, distinct=True),
        ),
    }
    found = []
    for data, (source, test) in sources.items():
        with tempfile.TemporaryDirectory() as folder:
            cache = build_cache(teacher, source, Path(folder))
        for losses in ALL_LOSSES:
            found.append(reach(teacher, cache, source, test, data, losses, sizes))
            say(found[-1].row())
    print("\n".join([HEAD, *(item.row() for item in found)]))
    students = [asdict(item) for item in found]
    for item in students:
        del item["hits"]
    return finish(bars(found), args.out, students=students)


if __name__ == "__main__":
    sys.exit(main())
