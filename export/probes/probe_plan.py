"""Plan a set of probes: which small graphs to time, at which sizes, and how they are compared."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from edgeclip.profiles.predict.tower_shapes import (
    CONV_PATCH,
    AnyTower,
    ConvTower,
    TowerBlock,
    TransformerTower,
    image_tokens,
)

ProbePrecision = Literal["fp32", "int8"]

_HEAD_SIZE, _RATIO, PROBE_DIM = 64, 4, 512  # as in nearly every CLIP
# Blocks that the deeper tower of a pair has more. Few of them would stay in the caches, where those
# of a whole student do not.
_MORE, _MORE_CONV = 5, 4


@dataclass(frozen=True, slots=True)
class PlannedGraph:
    """An ONNX file: a tower, or the stem of one."""

    tower: AnyTower
    precision: ProbePrecision
    stem: bool = False

    @property
    def path(self) -> str:
        """Its file; one graph takes texts of every length."""
        return f"{_title(self.tower, self.stem)}-{self.precision}.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProbe:
    """A graph that has `count` times `piece` more than the probe named `beyond`."""

    name: str
    graph: PlannedGraph
    piece: TowerBlock
    count: int = 1
    beyond: str | None = None
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCheck:
    """A whole tower."""

    name: str
    graph: PlannedGraph
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePoint:
    """A transformer's width, and the picture that it looks at."""

    width: int
    image_size: int
    patch: int
    few: bool = False

    def tower(self, layers: int, *, gelu: bool = False) -> TransformerTower:
        """An image tower of so many layers."""
        tokens = image_tokens(self.image_size, self.patch)
        return probe_transformer("image", self.width, layers, tokens, patch=self.patch, gelu=gelu)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPoint:
    """A transformer's width, and the lengths of the texts that it reads; one may be of the few."""

    width: int
    lengths: tuple[int, ...]
    few: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvPoint:
    """Channels of a ConvNeXt's stage, and the side of its map; `next` are those of a next stage."""

    width: int
    side: int
    next: int | None = None
    few: bool = False

    def tower(self, depth: int) -> ConvTower:
        """A tower of that stage alone, or with the step to the next one."""
        widths = (self.width,) if self.next is None else (self.width, self.next)
        depths = (depth,) if self.next is None else (depth, 0)
        return ConvTower(
            widths=widths, depths=depths, image_size=CONV_PATCH * self.side, dim=PROBE_DIM
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """What a set of probes holds.

    Attributes:
        precisions: fp32 comes first.
        images, texts, convs: where blocks, and what comes before and after them, are measured.
        stems: where only what cuts the patches is measured.
        gelus: where blocks with the exact GELU are measured.
        checks: whole towers; those marked are among the few.
    """

    precisions: tuple[ProbePrecision, ...] = ("fp32", "int8")
    images: tuple[ImagePoint, ...]
    texts: tuple[TextPoint, ...]
    convs: tuple[ConvPoint, ...]
    stems: tuple[ImagePoint, ...] = ()
    gelus: tuple[ImagePoint, ...] = ()
    checks: tuple[tuple[AnyTower, bool], ...] = ()

    def probes(self) -> Iterator[PlannedProbe]:
        """All probes; each comes after the one that it is compared with."""
        for point in self.images:
            yield from _image_probes(point, self.precisions)
        for point in self.stems:
            yield _stem_probe(point.tower(1), few=point.few)
        for point in self.gelus:
            yield from _gelu_probes(point, self.precisions)
        for text in self.texts:
            yield from _text_probes(text, self.precisions)
        for conv in self.convs:
            yield from _conv_probes(conv, self.precisions)

    def whole(self) -> Iterator[PlannedCheck]:
        """The whole towers."""
        for tower, few in self.checks:
            for precision in self.precisions:
                graph = PlannedGraph(tower, precision)
                name = f"check-{_title(tower, False, tokens=True)}-{precision}"
                yield PlannedCheck(name=name, graph=graph, few=few)


def probe_transformer(
    part: Literal["image", "text"],
    width: int,
    layers: int,
    tokens: int,
    *,
    patch: int = 0,
    gelu: bool = False,
) -> TransformerTower:
    """A tower with heads of 64 channels and an MLP of four times the width, as nearly all have."""
    return TransformerTower(
        part=part,
        width=width,
        heads=max(1, width // _HEAD_SIZE),
        hidden=_RATIO * width,
        layers=layers,
        tokens=tokens,
        dim=PROBE_DIM,
        patch=patch,
        gelu=gelu,
    )


def _image_probes(
    point: ImagePoint, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    stem = _stem_probe(point.tower(1), few=point.few)
    yield stem
    for precision in precisions:
        yield from _pair(point.tower(1), point.tower(1 + _MORE), precision, stem.name, point.few)


def _gelu_probes(
    point: ImagePoint, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    stem = _title(point.tower(1), True)
    for precision in precisions:
        yield from _pair(
            point.tower(1, gelu=True),
            point.tower(1 + _MORE, gelu=True),
            precision,
            stem,
            point.few,
        )


def _text_probes(
    point: TextPoint, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    more = 1 + _MORE
    for precision in precisions:
        for length in point.lengths:
            shallow = probe_transformer("text", point.width, 1, length)
            deep = replace(shallow, layers=more)
            yield from _pair(shallow, deep, precision, None, length == point.few)


def _pair(
    shallow: TransformerTower,
    deep: TransformerTower,
    precision: ProbePrecision,
    stem: str | None,
    few: bool,
) -> Iterator[PlannedProbe]:
    """One layer, and that layer with some blocks before it."""
    first = f"{_title(shallow, False, tokens=True)}-{precision}"
    yield PlannedProbe(
        name=first,
        graph=PlannedGraph(shallow, precision),
        piece=shallow.last(),
        beyond=stem,
        few=few,
    )
    yield PlannedProbe(
        name=f"{_title(deep, False, tokens=True)}-{precision}",
        graph=PlannedGraph(deep, precision),
        piece=deep.block(),
        count=deep.layers - shallow.layers,
        beyond=first,
        few=few,
    )


def _conv_probes(
    point: ConvPoint, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    """Stem, head, blocks, and the step to the next stage, which is float in every precision."""
    alone = replace(point, next=None)
    shallow, deep = alone.tower(0), alone.tower(_MORE_CONV)
    stem = _stem_probe(shallow, few=point.few)
    yield stem
    for precision in precisions:
        first = f"{_title(shallow, False)}-{precision}"
        yield PlannedProbe(
            name=first,
            graph=PlannedGraph(shallow, precision),
            piece=shallow.head(),
            beyond=stem.name,
            few=point.few,
        )
        yield PlannedProbe(
            name=f"{_title(deep, False)}-{precision}",
            graph=PlannedGraph(deep, precision),
            piece=deep.block(0),
            count=_MORE_CONV,
            beyond=first,
            few=point.few,
        )
    if point.next is not None:
        tower = point.tower(0)
        yield PlannedProbe(
            name=f"{_title(tower, False)}-fp32",
            graph=PlannedGraph(tower, "fp32"),
            piece=tower.down(1),
            beyond=f"{_title(shallow, False)}-fp32",
            few=point.few,
        )


def _stem_probe(tower: AnyTower, *, few: bool) -> PlannedProbe:
    return PlannedProbe(
        name=_title(tower, True),
        graph=PlannedGraph(tower, "fp32", stem=True),
        piece=tower.stem(),
        few=few,
    )


def _title(tower: AnyTower, stem: bool, *, tokens: bool = False) -> str:
    """A name by sizes; without `tokens` that of a graph for texts of every length."""
    dim = "" if tower.dim == PROBE_DIM else f"-e{tower.dim}"
    if isinstance(tower, ConvTower):
        widths, depths = ("_".join(map(str, item)) for item in (tower.widths, tower.depths))
        sizes = f"{tower.image_size}px-w{widths}"
        return f"stem-conv-{sizes}" if stem else f"conv-{sizes}-d{depths}{dim}"
    sizes = f"w{tower.width}"
    if tower.part == "image":
        sizes = f"{tower.image_size}px-p{tower.patch}-{sizes}"
    elif tokens:
        sizes = f"t{tower.tokens}-{sizes}"
    if stem:
        return f"stem-image-{sizes}"
    return f"{tower.part}-{sizes}-l{tower.layers}{'-gelu' * tower.gelu}{dim}"


_WIDTHS = (64, 128, 256, 512)
_PICTURES = ((64, 16), (64, 8), (224, 14))  # 17, 65 and 257 tokens
_FEW_IMAGES = ((128, 8), (512, 8), (256, 14))

STANDARD = ProbePlan(
    images=tuple(
        ImagePoint(width=width, image_size=size, patch=patch, few=(width, patch) in _FEW_IMAGES)
        for size, patch in _PICTURES
        for width in _WIDTHS
    ),
    stems=(
        ImagePoint(width=128, image_size=224, patch=32),
        ImagePoint(width=512, image_size=224, patch=32),
        ImagePoint(width=256, image_size=224, patch=16),
    ),
    gelus=(
        ImagePoint(width=128, image_size=64, patch=8),
        ImagePoint(width=256, image_size=64, patch=8),
    ),
    texts=tuple(TextPoint(width=width, lengths=(8, 24, 77), few=width == 256) for width in _WIDTHS),
    convs=(
        ConvPoint(width=32, side=16, next=64),
        ConvPoint(width=32, side=56, next=64),
        ConvPoint(width=64, side=8, next=128, few=True),
        ConvPoint(width=64, side=28, next=128),
        ConvPoint(width=128, side=4),
        ConvPoint(width=128, side=14),
        ConvPoint(width=128, side=28, next=256),
        ConvPoint(width=256, side=4),
        ConvPoint(width=256, side=14, next=512, few=True),
        ConvPoint(width=512, side=7),
    ),
    checks=(
        (probe_transformer("image", 192, 6, image_tokens(224, 32), patch=32), True),
        (probe_transformer("image", 384, 4, image_tokens(128, 16), patch=16), False),
        (probe_transformer("image", 320, 3, image_tokens(224, 14), patch=14), False),
        (probe_transformer("text", 192, 4, 16), True),
        (probe_transformer("text", 384, 6, 12), False),
        (ConvTower(widths=(48, 96, 192), depths=(2, 2, 4), image_size=64, dim=PROBE_DIM), True),
        (ConvTower(widths=(40, 80, 160), depths=(2, 2, 6), image_size=128, dim=PROBE_DIM), False),
        (ConvTower(widths=(64, 128, 256), depths=(1, 2, 3), image_size=224, dim=PROBE_DIM), False),
    ),
)
# For tests: it tells little, in seconds.
SMALL = ProbePlan(
    images=(
        ImagePoint(width=64, image_size=32, patch=8, few=True),
        ImagePoint(width=128, image_size=32, patch=8, few=True),
    ),
    texts=(TextPoint(width=64, lengths=(8, 16)),),
    convs=(ConvPoint(width=16, side=8, next=32),),
    checks=((probe_transformer("image", 64, 4, image_tokens(32, 8), patch=8), True),),
)
PLANS = {"standard": STANDARD, "small": SMALL}
