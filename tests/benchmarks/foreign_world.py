"""Whether distilling by its defaults ever takes a student away from its teacher, on any pictures.

Three worlds of pairs, of which the built-in teacher knows the first alone:

- EmojiScenes, which it was trained on;
- dead leaves (Lee, Mumford, Huang 2001) with everyday sentences drawn by chance: shapes that cover
  each other, their sizes by a power law, under noise with the spectrum of photographs. They share
  the statistics of photographs, and image models learn from them (Baradad et al. 2021). The pairs
  mean nothing;
- textures, gradients and noise, with captions that say what they are.

Students learn by `distill` as the command calls it, with the default losses, by the feature loss
alone, and by one-hot targets ("this caption and no other"), which must be seen to pull a student
out of a space whose teacher does not know the pairs: else the benchmark would see nothing. How
well student and teacher agree on held-out pictures is followed from before the first step on.

With `--out FILE.json`, FILE.html shows the curves. Without `--quick` it takes some 90 minutes on
two cores.
"""

import hashlib
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _bars import Bar, Rule, finish, hold, options, say
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import EmojiSource, Pair, Source, relevance_of
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, embed_source
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.held_out import (
    IMAGE_COSINE,
    STUDENT_R1,
    TEXT_COSINE,
    HeldOut,
)
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings, read_log
from edgeclip.profiles.report.charts import TrainingCurve
from edgeclip.profiles.report.sections import FigureGrid, Note, Page, PageSummary, Section
from edgeclip.profiles.report.write_page import write_html
from edgeclip.runtime.bundle.index import cosines
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_loss, estimate_share
from edgeclip.runtime.stats.student_t import estimate_mean

BARS: dict[str, Rule] = {
    "*_agreement_gained": (">=", 0.1, ""),
    "*_largest_fall": ("<=", 0.02, ""),
    "dead_leaves_cosine_below_feature_alone": ("<=", 0.02, ""),
    "dead_leaves_one_hot_falls_by": (">=", 0.02, ""),
    "dead_leaves_cosine_above_one_hot": (">=", 0.1, ""),
    "emoji_r1_above_feature_alone": (">=", -1.0, "points"),
}
KEPT_MODELS = ("compress/emoji_teacher",)


class Drawn:
    """Pairs drawn by code: pair i is a function of `seed` and i alone.

    Args:
        name: of the world.
        pair: draws picture and caption, given a generator and the side in pixels.
        count, size, seed: how many, how large, which.
    """

    has_captions = True
    split: Split | None = None

    def __init__(
        self,
        name: str,
        pair: Callable[[np.random.Generator, int], tuple[Image.Image, str]],
        count: int,
        *,
        size: int,
        seed: int,
    ) -> None:
        self.name = f"{count} {name}"
        self.identity = f"{name}:{count}:{size}:{seed}"
        self._pairs = [Pair(*pair(np.random.default_rng((seed, i)), size)) for i in range(count)]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[index]

    def caption(self, index: int) -> str | None:
        return self._pairs[index].caption

    def captions(self, index: int) -> tuple[str, ...]:
        caption = self._pairs[index].caption
        return () if caption is None else (caption,)

    def content(self, index: int) -> str:
        return hashlib.sha256(self._pairs[index].image.tobytes()).hexdigest()


_SENTENCE = [
    tuple(words.split(","))
    for words in (
        "a man,two women,a child,an old dog,several people,a cyclist,the girl in red,a crowd",
        "walks along,looks at,sits beside,jumps over,takes a picture of,waits near,runs past",
        "the beach,a parked car,some trees,a market stall,the river,a wooden fence,a tall wall",
        "at night,in the rain,on a sunny day,in winter,early in the morning,after work",
    )
]


def dead_leaves(rng: np.random.Generator, size: int) -> tuple[Image.Image, str]:
    """Draw discs, boxes and triangles from the back to the front, radii by r^-3; any sentence."""
    scale = 2 * size
    picture = Image.new("RGB", (scale, scale), _muted(rng))
    draw = ImageDraw.Draw(picture)
    low, high = 0.02 * scale, 0.5 * scale
    for chance in rng.uniform(size=80):
        radius = (low**-2 + chance * (high**-2 - low**-2)) ** -0.5
        x, y = rng.uniform(0, scale, 2)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_muted(rng))
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 4 if kind == 1 else 3))
            corners = [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles]
            draw.polygon(corners, fill=_muted(rng))
    small = picture.resize((size, size), Image.Resampling.BICUBIC)
    noisy = np.asarray(small, dtype=np.float64) + 24 * _noise(rng, size, 1.0)[..., None]
    return _image(noisy), " ".join(str(rng.choice(words)) for words in _SENTENCE)


def _muted(rng: np.random.Generator) -> tuple[int, int, int]:
    """A muted colour: most of its variance is brightness, as in photographs."""
    red, green, blue = (128 + 60 * rng.normal() + 22 * rng.normal(size=3)).clip(0, 255)
    return int(red), int(green), int(blue)


def _noise(rng: np.random.Generator, size: int, power: float) -> NDArray[np.float64]:
    """Noise of unit variance whose amplitude falls as 1 / frequency^power."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(size, size))) / frequency**power
    noise = np.fft.irfft2(spectrum, s=(size, size))
    unit: NDArray[np.float64] = noise / noise.std()
    return unit


def _image(levels: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


_COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 70, 200),
    "yellow": (240, 220, 60),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "brown": (120, 80, 40),
    "grey": (128, 128, 128),
}


def texture(rng: np.random.Generator, size: int) -> tuple[Image.Image, str]:
    """Mix two colours by a pattern, and say which."""
    one, other = (str(name) for name in rng.choice(list(_COLOURS), 2, replace=False))
    down, across = np.mgrid[:size, :size] / size - 0.5
    angle, waves = rng.uniform(0, math.pi), int(rng.integers(2, 9))
    along = across * math.cos(angle) + down * math.sin(angle)
    far = np.hypot(across - rng.uniform(-0.3, 0.3), down - rng.uniform(-0.3, 0.3))
    kind = str(rng.choice(["gradient", "stripes", "rings", "checks", "clouds", "grain", "glow"]))
    mix = {
        "gradient": along + 0.5,
        "stripes": 0.5 + 0.5 * np.sin(2 * math.pi * waves * along),
        "rings": 0.5 + 0.5 * np.sin(2 * math.pi * waves * far),
        "checks": (np.floor(waves * across) + np.floor(waves * down)) % 2,
        "clouds": 0.5 + 0.3 * _noise(rng, size, 1.6),
        "grain": 0.5 + 0.25 * rng.normal(size=(size, size)),
        "glow": np.exp(-((far / 0.25) ** 2)),
    }[kind].clip(0, 1)[..., None]
    levels = np.array(_COLOURS[one]) * mix + np.array(_COLOURS[other]) * (1 - mix)
    return _image(levels + 4 * rng.normal(size=(size, size, 1))), f"{kind} in {one} and {other}"


class Sizes(NamedTuple):
    """How much is trained and measured; all else is as in `edgeclip distill`."""

    pictures: int = 8192
    test: int = 500
    steps: int = 2000
    batch_size: int = 128


QUICK = Sizes(pictures=1024, test=200, steps=60, batch_size=64)

DEFAULTS, FEATURE, ONE_HOT = "defaults", "feature alone", "one-hot"
WEIGHTS = {
    DEFAULTS: LossWeights(),
    FEATURE: LossWeights(affinity=0, interactive=0),
    ONE_HOT: LossWeights(affinity=0, interactive=0, feature=0, contrastive=1),
}
EMOJI, LEAVES, TEXTURES = "emoji", "dead leaves", "textures"
RUNS = {EMOJI: (DEFAULTS, FEATURE), LEAVES: (DEFAULTS, FEATURE, ONE_HOT), TEXTURES: (DEFAULTS,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What a student reached with some losses on some data.

    Attributes:
        steps: of each validation; 0 is before the first step.
        agreement: held-out cosine of each, the mean of both towers.
        held_out_r1: of each but the first.
        image_cosine, text_cosine: to the teacher, on pairs that were never seen.
        r1, teacher_r1: R@1 there, mean of both directions.
        hits: of each test pair, for paired comparisons; not written.
    """

    data: str
    losses: str
    steps: list[int]
    agreement: list[float]
    held_out_r1: list[float]
    image_cosine: Interval
    text_cosine: Interval
    r1: Interval
    teacher_r1: Interval
    hits: NDArray[np.float64]

    @property
    def cosine(self) -> float:
        """The mean of both towers."""
        return (self.image_cosine.value + self.text_cosine.value) / 2

    @property
    def largest_fall(self) -> float:
        """How far the agreement lay below the best before, at most."""
        values = np.array(self.agreement)
        return float((np.maximum.accumulate(values) - values).max())

    def row(self) -> str:
        """A line of the table."""
        return (
            f"{self.data:<12} {self.losses:<14} {self.agreement[0]:>7.3f} "
            f"{self.agreement[-1]:>7.3f} {self.largest_fall:>7.3f} {self.image_cosine.value:>7.3f} "
            f"{self.text_cosine.value:>7.3f} {self.r1.value:>7.1%} {self.teacher_r1.value:>7.1%}"
        )


HEAD = (
    f"{'data':<12} {'losses':<14} {'agreed before, after':>15} {'fell':>3} {'image':>7} "
    f"{'text':>7} {'R@1':>7} {'teacher':>7}"
)


def reach(
    teacher: DualEncoder, cache: TeacherCache, world: "World", losses: str, sizes: Sizes
) -> Reached:
    """Distil a student as `edgeclip distill` does, and measure it."""
    student = new_student(teacher, StudentShape())
    rows = Sampling(parts_of(world.train)).held_out
    before = HeldOut(student, cache, world.train, rows)().values
    with tempfile.TemporaryDirectory() as folder:
        distill(
            student,
            cache,
            world.train,
            loss_weights=WEIGHTS[losses],
            settings=TrainSettings(steps=sizes.steps, batch_size=sizes.batch_size),
            out=Path(folder),
        )
        log = [line for line in read_log(Path(folder) / "log.jsonl") if IMAGE_COSINE in line]
    ours, theirs = (
        [part.numpy() for part in embed_source(model, world.test)] for model in (student, teacher)
    )
    relevance = relevance_of(world.test)
    hits, teacher_hits = (
        pair_ranks(image, text, relevance).hits(1) for image, text in (ours, theirs)
    )
    return Reached(
        data=world.name,
        losses=losses,
        steps=[0, *(int(line["step"]) for line in log)],
        agreement=[(line[IMAGE_COSINE] + line[TEXT_COSINE]) / 2 for line in (before, *log)],
        held_out_r1=[sum(line[name] for name in STUDENT_R1) / 2 for line in log],
        image_cosine=estimate_mean(cosines(ours[0], theirs[0])).interval,
        text_cosine=estimate_mean(cosines(ours[1], theirs[1])).interval,
        r1=estimate_share(hits).interval,
        teacher_r1=estimate_share(teacher_hits).interval,
        hits=hits,
    )


class World(NamedTuple):
    """Pairs to train on, and others to test on."""

    name: str
    train: Source
    test: Source


def worlds(sizes: Sizes, size: int) -> list[World]:
    """The three worlds, at the teacher's size."""
    emoji = World(
        EMOJI,
        EmojiSource("train", sizes.pictures, size=size),
        EmojiSource("test", sizes.test, size=size, distinct=True),
    )
    drawn = [
        World(
            name,
            Drawn(name, pair, sizes.pictures, size=size, seed=0),
            Drawn(name, pair, sizes.test, size=size, seed=1),
        )
        for name, pair in ((LEAVES, dead_leaves), (TEXTURES, texture))
    ]
    return [emoji, *drawn]


def bars(found: Sequence[Reached]) -> list[Bar]:
    """What the defaults must hold, and that the benchmark sees where they would not."""
    by_name = {(item.data, item.losses): item for item in found}
    items: list[Bar] = []
    for data in RUNS:
        now, name = by_name[data, DEFAULTS], data.replace(" ", "_")
        items += [
            hold(BARS, f"{name}_agreement_gained", now.agreement[-1] - now.agreement[0]),
            hold(BARS, f"{name}_largest_fall", now.largest_fall),
        ]
    leaves, alone, one_hot = (by_name[LEAVES, losses] for losses in RUNS[LEAVES])
    known, known_alone = by_name[EMOJI, DEFAULTS], by_name[EMOJI, FEATURE]
    gained = estimate_loss(known.hits, known_alone.hits).interval.scaled(100)
    return [
        *items,
        hold(BARS, "dead_leaves_cosine_below_feature_alone", alone.cosine - leaves.cosine),
        hold(BARS, "dead_leaves_one_hot_falls_by", one_hot.largest_fall),
        hold(BARS, "dead_leaves_cosine_above_one_hot", leaves.cosine - one_hot.cosine),
        # Known pairs: what the teacher says of image and text must not cost what it finds.
        hold(BARS, "emoji_r1_above_feature_alone", gained),
    ]


def write_curves(found: Sequence[Reached], path: Path) -> None:
    """Draw the agreement of each run over its steps."""
    charts = tuple(
        TrainingCurve(
            f"{item.data}, {item.losses}",
            tuple(map(float, item.steps)),
            tuple(item.agreement),
            reference=(item.agreement[0], "before the first step"),
        )
        for item in found
    )
    note = "Mean cosine of both towers to the teacher, on pictures held out of training."
    section = Section(anchor="curves", title="Agreement", blocks=(Note(note), FigureGrid(charts)))
    write_html(
        Page(
            title="Distilling in worlds that the teacher knows, and does not know",
            lead=("The built-in teacher, and students of half its heads and layers.",),
            summary=PageSummary("", ""),
            sections=(section,),
        ),
        path,
    )


def main() -> int:
    """Distil, measure, print the table and the bars."""
    args = options(__doc__).parse_args()
    sizes = QUICK if args.quick else Sizes()
    teacher = DualEncoder.load(built_in_teacher())
    found = []
    for world in worlds(sizes, teacher.image_spec.size):
        with tempfile.TemporaryDirectory() as folder:
            cache = build_cache(teacher, world.train, Path(folder))
            for losses in RUNS[world.name]:
                found.append(reach(teacher, cache, world, losses, sizes))
                say(found[-1].row())
    print("\n".join([HEAD, *(item.row() for item in found)]))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_curves(found, args.out.with_suffix(".html"))
    students = [asdict(item) for item in found]
    for item in students:
        del item["hits"]
    return finish(bars(found), args.out, students=students)


if __name__ == "__main__":
    sys.exit(main())
