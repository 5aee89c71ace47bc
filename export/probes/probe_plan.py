"""Plan a set of probes: which small graphs are timed, at which sizes, and how they are compared."""

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
# Blocks that the deeper tower of a pair has more. With fewer they would stay in the caches, where
# those of a whole student do not.
_EXTRA_BLOCKS, _EXTRA_CONV_BLOCKS = 5, 4


@dataclass(frozen=True, slots=True)
class PlannedGraph:
    """One ONNX file: a tower, or the stem of one."""

    tower: AnyTower
    precision: ProbePrecision
    stem: bool = False

    @property
    def path(self) -> str:
        """Name of the file; one graph takes texts of every length."""
        return f"{_title(self.tower, self.stem)}-{self.precision}.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProbe:
    """A graph that has `count` blocks more than the probe named `beyond`; see `Probe`."""

    name: str
    graph: PlannedGraph
    piece: TowerBlock
    count: int = 1
    beyond: str | None = None
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCheck:
    """A whole tower, to check predictions; see `CheckTower`."""

    name: str
    graph: PlannedGraph
    few: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProbeSize:
    """Width of an image transformer, and sizes of its image and patches, where it is probed."""

    width: int
    image_size: int
    patch: int
    few: bool = False

    def tower(self, layers: int, *, gelu: bool = False) -> TransformerTower:
        """Return an image tower with this number of layers."""
        tokens = image_tokens(self.image_size, self.patch)
        return probe_transformer("image", self.width, layers, tokens, patch=self.patch, gelu=gelu)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextProbeSize:
    """Width of a text transformer, and text lengths where it is probed; `few` is one of these."""

    width: int
    lengths: tuple[int, ...]
    few: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvProbeSize:
    """Channels and map side of a ConvNeXt stage, and channels of the next stage, if probed."""

    width: int
    side: int
    next: int | None = None
    few: bool = False

    def tower(self, depth: int, *, grn: bool = False) -> ConvTower:
        """Return a tower of that stage alone, or with the step down to the next one."""
        widths = (self.width,) if self.next is None else (self.width, self.next)
        depths = (depth,) if self.next is None else (depth, 0)
        return ConvTower(
            widths=widths, depths=depths, image_size=CONV_PATCH * self.side, dim=PROBE_DIM, grn=grn
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """What a set of probes holds.

    Attributes:
        precisions: fp32 comes first.
        images, texts, convs: where blocks, and what comes before and after them, are measured.
        stems: where only what cuts the patches is measured.
        gelus: where blocks with the exact GELU are measured.
        grns: where blocks of ConvNeXt V2 are measured, each one of `convs` too.
        checks: whole towers; those marked are among the few.
    """

    precisions: tuple[ProbePrecision, ...] = ("fp32", "int8")
    images: tuple[ImageProbeSize, ...]
    texts: tuple[TextProbeSize, ...]
    convs: tuple[ConvProbeSize, ...]
    stems: tuple[ImageProbeSize, ...] = ()
    gelus: tuple[ImageProbeSize, ...] = ()
    grns: tuple[ConvProbeSize, ...] = ()
    checks: tuple[tuple[AnyTower, bool], ...] = ()

    def probes(self) -> Iterator[PlannedProbe]:
        """Yield all probes, each after the one that it is compared with."""
        for size in self.images:
            yield from _image_probes(size, self.precisions)
        for size in self.stems:
            yield _stem_probe(size.tower(1), few=size.few)
        for size in self.gelus:
            yield from _gelu_probes(size, self.precisions)
        for text in self.texts:
            yield from _text_probes(text, self.precisions)
        for conv in self.convs:
            yield from _conv_probes(conv, self.precisions)
        for conv in self.grns:
            yield from _grn_probes(conv, self.precisions)

    def check_towers(self) -> Iterator[PlannedCheck]:
        """Yield the whole towers."""
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
    """Return a tower with heads of 64 channels and an MLP of four times the width, as is usual."""
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
    size: ImageProbeSize, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    stem = _stem_probe(size.tower(1), few=size.few)
    yield stem
    for precision in precisions:
        yield from _pair(
            size.tower(1), size.tower(1 + _EXTRA_BLOCKS), precision, stem.name, size.few
        )


def _gelu_probes(
    size: ImageProbeSize, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    stem = _title(size.tower(1), True)
    for precision in precisions:
        yield from _pair(
            size.tower(1, gelu=True),
            size.tower(1 + _EXTRA_BLOCKS, gelu=True),
            precision,
            stem,
            size.few,
        )


def _text_probes(
    size: TextProbeSize, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    more = 1 + _EXTRA_BLOCKS
    for precision in precisions:
        for length in size.lengths:
            shallow = probe_transformer("text", size.width, 1, length)
            deep = replace(shallow, layers=more)
            yield from _pair(shallow, deep, precision, None, length == size.few)


def _pair(
    shallow: TransformerTower,
    deep: TransformerTower,
    precision: ProbePrecision,
    stem: str | None,
    few: bool,
) -> Iterator[PlannedProbe]:
    """Yield probes of a one-layer tower, and of the same with more layers."""
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
    size: ConvProbeSize, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    """Yield stem, head, blocks, and the step to the next stage, which is float in int8 too."""
    alone = replace(size, next=None)
    shallow, deep = alone.tower(0), alone.tower(_EXTRA_CONV_BLOCKS)
    stem = _stem_probe(shallow, few=size.few)
    yield stem
    for precision in precisions:
        first = f"{_title(shallow, False)}-{precision}"
        yield PlannedProbe(
            name=first,
            graph=PlannedGraph(shallow, precision),
            piece=shallow.head(),
            beyond=stem.name,
            few=size.few,
        )
        yield PlannedProbe(
            name=f"{_title(deep, False)}-{precision}",
            graph=PlannedGraph(deep, precision),
            piece=deep.block(0),
            count=_EXTRA_CONV_BLOCKS,
            beyond=first,
            few=size.few,
        )
    if size.next is not None:
        tower = size.tower(0)
        yield PlannedProbe(
            name=f"{_title(tower, False)}-fp32",
            graph=PlannedGraph(tower, "fp32"),
            piece=tower.down(1),
            beyond=f"{_title(shallow, False)}-fp32",
            few=size.few,
        )


def _grn_probes(
    size: ConvProbeSize, precisions: tuple[ProbePrecision, ...]
) -> Iterator[PlannedProbe]:
    """Yield blocks of ConvNeXt V2, whose stem and head are those of ConvNeXt."""
    shallow, deep = size.tower(0), size.tower(_EXTRA_CONV_BLOCKS, grn=True)
    for precision in precisions:
        yield PlannedProbe(
            name=f"{_title(deep, False)}-{precision}",
            graph=PlannedGraph(deep, precision),
            piece=deep.block(0),
            count=_EXTRA_CONV_BLOCKS,
            beyond=f"{_title(shallow, False)}-{precision}",
            few=size.few,
        )


def _stem_probe(tower: AnyTower, *, few: bool) -> PlannedProbe:
    return PlannedProbe(
        name=_title(tower, True),
        graph=PlannedGraph(tower, "fp32", stem=True),
        piece=tower.stem(),
        few=few,
    )


def _title(tower: AnyTower, stem: bool, *, tokens: bool = False) -> str:
    """Name a tower by its sizes; without `tokens` a graph for texts of every length."""
    dim = "" if tower.dim == PROBE_DIM else f"-e{tower.dim}"
    if isinstance(tower, ConvTower):
        widths, depths = ("_".join(map(str, item)) for item in (tower.widths, tower.depths))
        sizes = f"{tower.image_size}px-w{widths}"
        return f"stem-conv-{sizes}" if stem else f"conv-{sizes}-d{depths}{'-grn' * tower.grn}{dim}"
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
        ImageProbeSize(width=width, image_size=size, patch=patch, few=(width, patch) in _FEW_IMAGES)
        for size, patch in _PICTURES
        for width in _WIDTHS
    ),
    stems=(
        ImageProbeSize(width=128, image_size=224, patch=32),
        ImageProbeSize(width=512, image_size=224, patch=32),
        ImageProbeSize(width=256, image_size=224, patch=16),
    ),
    gelus=(
        ImageProbeSize(width=128, image_size=64, patch=8),
        ImageProbeSize(width=256, image_size=64, patch=8),
    ),
    texts=tuple(
        TextProbeSize(width=width, lengths=(8, 24, 77), few=24 if width == 256 else None)
        for width in _WIDTHS
    ),
    convs=(
        ConvProbeSize(width=32, side=16, next=64),
        ConvProbeSize(width=32, side=56, next=64),
        ConvProbeSize(width=64, side=8, next=128, few=True),
        ConvProbeSize(width=64, side=28, next=128),
        ConvProbeSize(width=128, side=4),
        ConvProbeSize(width=128, side=14),
        ConvProbeSize(width=128, side=28, next=256),
        ConvProbeSize(width=256, side=4),
        ConvProbeSize(width=256, side=14, next=512, few=True),
        ConvProbeSize(width=512, side=7),
    ),
    grns=(
        ConvProbeSize(width=32, side=16),
        ConvProbeSize(width=32, side=56),
        ConvProbeSize(width=64, side=8, few=True),
        ConvProbeSize(width=64, side=28),
        ConvProbeSize(width=128, side=4),
        ConvProbeSize(width=128, side=14),
        ConvProbeSize(width=256, side=4),
        ConvProbeSize(width=256, side=14),
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
        (
            ConvTower(
                widths=(48, 96, 192), depths=(2, 2, 4), image_size=64, dim=PROBE_DIM, grn=True
            ),
            False,
        ),
    ),
)
# For tests: it tells little, in seconds.
SMALL = ProbePlan(
    images=(
        ImageProbeSize(width=64, image_size=32, patch=8, few=True),
        ImageProbeSize(width=128, image_size=32, patch=8, few=True),
    ),
    texts=(TextProbeSize(width=64, lengths=(8, 16)),),
    convs=(ConvProbeSize(width=16, side=8, next=32),),
    checks=((probe_transformer("image", 64, 4, image_tokens(32, 8), patch=8), True),),
)
PLANS = {"standard": STANDARD, "small": SMALL}
