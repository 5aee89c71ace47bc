"""Find the largest student of a teacher that meets a latency budget on a measured device.

Nothing is trained or run: latencies are predicted from block costs of the device. A tower whose
blocks no probe measures is named with its size alone.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPConfig, MetaClip2Config

from edgeclip.compress.students.image_families import IMAGE_FAMILIES, ImageFamilyName, image_tower
from edgeclip.compress.students.student import StudentShape
from edgeclip.compress.teachers.families import FAMILIES
from edgeclip.profiles.predict.measured_device import MeasuredDevice
from edgeclip.profiles.predict.predict_latency import Prediction, Predictor
from edgeclip.profiles.predict.tower_shapes import (
    CONV_PATCH,
    AnyTower,
    ConvTower,
    TransformerTower,
    image_tokens,
)
from edgeclip.runtime.console import percent
from edgeclip.runtime.errors import ConfigError, InputError, first_line
from edgeclip.runtime.spec import Precision, Tower


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSizes:
    """Sizes of a teacher.

    Attributes:
        kind: its family, as config.json calls it.
        image, text: the towers; `tokens` of the text tower is the whole context. None for other
            families than CLIP and MetaCLIP 2, whose towers are alike: no probe measures the blocks
            of theirs.
        image_size: side of an image in pixels.
        dim: length of an embedding.
        vocab_size: token vectors of the text tower.
        whole: weights of the image and of the text tower, projections included.
    """

    kind: str
    image: TransformerTower | None
    text: TransformerTower | None
    image_size: int
    dim: int
    vocab_size: int
    whole: tuple[int, int]

    @classmethod
    def read(cls, source: str | Path) -> "TeacherSizes":
        """Read `config.json` of a directory or hub id; no weights are loaded.

        Raises:
            ConfigError: not found, or of another architecture.
        """
        try:
            name, _, revision = str(source).partition("@")
            if not revision or Path(source).is_dir():
                config = AutoConfig.from_pretrained(source)
            else:  # OWNER/NAME@REVISION
                config = AutoConfig.from_pretrained(name, revision=revision)
        except Exception as error:  # transformers raises many kinds on damaged files
            raise ConfigError(
                f"cannot read the configuration of the teacher {source}: {first_line(error)}"
            ) from error
        if config.model_type not in FAMILIES:
            raise ConfigError(
                f"{source} is a {config.model_type}: only students of "
                f"{', '.join(FAMILIES)} can be planned"
            )
        vision: Any = config.vision_config
        text: Any = config.text_config
        size = _whole(vision.image_size)
        dim = FAMILIES[config.model_type].dim(config)
        image, words = None, None
        if isinstance(config, CLIPConfig | MetaClip2Config):
            patch = _whole(vision.patch_size)
            image = _tower("image", vision, image_tokens(size, patch), dim, patch)
            words = _tower("text", text, int(text.max_position_embeddings), dim, 0)
        return cls(
            kind=str(config.model_type),
            image=image,
            text=words,
            image_size=size,
            dim=dim,
            vocab_size=int(text.vocab_size),
            whole=_count_whole(config),
        )

    def tower(self, part: Tower) -> TransformerTower | None:
        """Return one of the two towers."""
        return self.image if part == "image" else self.text

    def parameters(self, tower: AnyTower) -> int:
        """Count the weights of a tower of this teacher or a student, projection included."""
        if isinstance(tower, ConvTower):
            return _conv_parameters(tower)
        width, hidden = tower.width, tower.hidden
        layer = 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width
        around = 2 * width + width * tower.dim
        if tower.part == "image":
            before = width * (3 * tower.patch**2 + 1 + tower.tokens + 2)
        else:
            assert self.text is not None  # a CLIP, of which `tower` is a smaller part
            before = width * (self.vocab_size + self.text.tokens)
        return before + tower.layers * layer + around


def _count_whole(config: Any) -> tuple[int, int]:
    """Count the weights of both towers without making them."""
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        model: Any = family.model_class(config)(config)

    def count(part: Tower) -> int:
        modules = [getattr(model, name) for name in family.tower_names(part)]
        return sum(weight.numel() for module in modules for weight in module.parameters())

    return count("image"), count("text")


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise ConfigError(
            f"config.json has {value} where one whole number is needed: only square images and "
            "patches can be planned"
        )
    return value


def _tower(part: Tower, config: Any, tokens: int, dim: int, patch: int) -> TransformerTower:
    return TransformerTower(
        part=part,
        width=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        hidden=int(config.intermediate_size),
        layers=int(config.num_hidden_layers),
        tokens=tokens,
        dim=dim,
        patch=patch,
        gelu=config.hidden_act != "quick_gelu",
    )


def _conv_parameters(tower: ConvTower) -> int:
    first, last = tower.widths[0], tower.widths[-1]
    count = first * (3 * CONV_PATCH**2 + 1 + 2) + 2 * last + last * tower.dim
    for before, width in zip(tower.widths, tower.widths[1:], strict=False):
        count += 2 * before + 4 * before * width + width
    for width, depth in zip(tower.widths, tower.depths, strict=True):
        count += depth * (8 * width**2 + (49 + 1 + 2 + 4 + 1 + 8 * tower.grn) * width)
    return count


_CONV_FAMILIES: tuple[ImageFamilyName, ...] = ("convolutional", "convnextv2")
_CONV_WIDTHS = ((24, 48, 96), (32, 64, 128), (48, 96, 192), (64, 128, 256), (96, 192, 384))
_CONV_DEPTHS = ((2, 2, 4), (2, 2, 6), (3, 3, 9))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStudent:
    """A candidate tower of a student.

    Attributes:
        shape: sizes for `new_student`; the other tower has the default sizes.
        tower: sizes of the tower.
        parameters: number of weights of the tower.
        share: `parameters` as a share of the teacher's tower of that part.
        prediction: the predicted latency.
        keeps: even the upper bound of the prediction meets the budget; see the prediction for how
            sure that bound is.
    """

    shape: StudentShape
    tower: AnyTower
    parameters: int
    share: float
    prediction: Prediction
    keeps: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpredictedStudent:
    """A candidate image tower of a family whose blocks no probe measures.

    Attributes:
        shape: sizes for `new_student`.
        parameters: number of weights of the tower, projection included.
        share: `parameters` as a share of the teacher's image tower.
    """

    shape: StudentShape
    parameters: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPlan:
    """All candidate towers, the largest first.

    Attributes:
        students: those whose latency could be predicted.
        best: the largest that meets the budget.
        unknown: how many sizes lie too far from what was measured.
        unpredicted: towers of the families that cannot be predicted.
        too_small: families that have no tower for pictures as small as the teacher's.
    """

    students: tuple[PlannedStudent, ...]
    best: PlannedStudent
    unknown: int
    unpredicted: tuple[UnpredictedStudent, ...] = ()
    too_small: tuple[ImageFamilyName, ...] = ()


def plan_student(
    teacher: TeacherSizes,
    measured: MeasuredDevice,
    *,
    latency_ms: float,
    part: Tower = "image",
    precision: Precision = "fp32",
    text_tokens: int | None = None,
) -> StudentPlan:
    """Predict the latency of every candidate, and choose the largest that meets the budget.

    The level of a bound is that of one tower. The chosen one is the largest of many that keep the
    budget, so a bound that is too low is chosen more often than another: measure it.

    Args:
        teacher: its sizes.
        measured: the device.
        latency_ms: budget of one image or text.
        part: which tower.
        precision: precision of the graph that will run.
        text_tokens: length of a text, start and end included; None for the whole context.

    Raises:
        InputError: no student meets the budget; the message names the fastest. Or a precision
            that was not measured, or in which no whole tower was, so that no prediction has a
            bound; or sizes that are all too far from those that were.
    """
    predictor = Predictor(measured)
    students, unknown, why = [], 0, ""
    whole = teacher.whole[0 if part == "image" else 1]
    has_grn = predictor.measures("grn-block")
    known = _CONV_FAMILIES if has_grn else _CONV_FAMILIES[:1]
    for shape, tower in candidates(teacher, part, text_tokens, known):
        try:
            prediction = predictor.predict(tower, precision)
        except InputError as error:
            unknown, why = unknown + 1, str(error)
            continue
        count = teacher.parameters(tower)
        students.append(
            PlannedStudent(
                shape=shape,
                tower=tower,
                parameters=count,
                share=count / whole,
                prediction=prediction,
                keeps=prediction.high <= latency_ms,
            )
        )
    if not students:
        raise InputError(f"no student of this teacher can be predicted: {why}")
    students.sort(key=lambda item: (-item.parameters, item.prediction.ms))
    best = next((item for item in students if item.keeps), None)
    if best is None:
        raise InputError(_why_none(students, measured, latency_ms, precision))
    others, too_small = _unpredicted(teacher, known) if part == "image" else ((), ())
    return StudentPlan(
        students=tuple(students),
        best=best,
        unknown=unknown,
        unpredicted=others,
        too_small=too_small,
    )


def _why_none(
    students: Sequence[PlannedStudent],
    measured: MeasuredDevice,
    latency_ms: float,
    precision: Precision,
) -> str:
    fastest = min(students, key=lambda item: (item.prediction.high, item.prediction.ms))
    found = fastest.prediction
    start = f"no student surely keeps {latency_ms:g} ms in {precision} on {measured.name}: "
    about = f"the fastest, {describe(fastest)}, takes about {found.ms:.2f} ms"
    if math.isinf(found.high):
        return (
            f"{start}{about}, but no whole tower was measured there in {precision}, so that no "
            "prediction has a bound; measure probes that have some, as `edgeclip probes` writes"
        )
    sure = "by a rule of thumb" if found.level is None else f"in {percent(found.level)} of cases"
    return (
        f"{start}{about} (up to {found.high:.2f} {sure}); allow more time, or try another precision"
    )


def candidates(
    teacher: TeacherSizes,
    part: Tower,
    text_tokens: int | None = None,
    families: Sequence[ImageFamilyName] = _CONV_FAMILIES,
) -> Iterator[tuple[StudentShape, AnyTower]]:
    """Yield every number of heads and layers that can be inherited; for images some ConvNeXts too.

    `families` are those of the ConvNeXts.

    Raises:
        InputError: a text longer than the teacher reads, or a text tower that no probe measures.
    """
    base = teacher.tower(part)
    if base is None:
        if part == "text":
            raise InputError(
                f"the text tower of a {teacher.kind} cannot be planned, for no probe measures its "
                "blocks: measure a student with `edgeclip profile`"
            )
        yield from _convolutional(teacher, families)
        return
    if part == "text" and text_tokens is not None:
        if not 2 <= text_tokens <= base.tokens:
            raise InputError(f"a text of this teacher has 2 to {base.tokens} tokens")
        base = replace(base, tokens=text_tokens)
    for heads in range(1, base.heads + 1):
        for layers in range(1, base.layers + 1):
            if part == "image":
                shape = StudentShape(image_heads=heads, image_layers=layers)
            else:
                shape = StudentShape(text_heads=heads, text_layers=layers)
            yield shape, _shrunk(base, heads, layers)
    if part == "image":
        yield from _convolutional(teacher, families)


def distill_options(student: PlannedStudent | UnpredictedStudent, part: Tower) -> list[str]:
    """Return the options of `edgeclip distill` for this tower; the other one keeps its default."""
    shape = student.shape
    words = ["--family", shape.family]
    if shape.family != "inherited":
        usual = IMAGE_FAMILIES[shape.family]
        given = {"--conv-widths": shape.conv_widths, "--conv-depths": shape.conv_depths}
        for (option, sizes), own in zip(given.items(), (usual.widths, usual.depths), strict=True):
            if sizes not in (None, own):
                words += [option, *map(str, sizes or ())]
        return words
    for name in (f"{part}_heads", f"{part}_layers"):
        words += [f"--{name.replace('_', '-')}", str(getattr(shape, name))]
    return words


def worth_showing(plan: StudentPlan) -> tuple[PlannedStudent, ...]:
    """Return of each width the deepest student that meets the budget, and the next deeper one."""
    by_width: dict[object, list[PlannedStudent]] = {}
    for item in plan.students:
        tower = item.tower
        key = (tower.grn, tower.widths) if isinstance(tower, ConvTower) else tower.width
        by_width.setdefault(key, []).append(item)
    shown: list[PlannedStudent] = []
    for same in by_width.values():
        shown += [item for item in same if not item.keeps][-1:]
        shown += [item for item in same if item.keeps][:1]
    return tuple(sorted(shown, key=lambda item: (-item.parameters, item.prediction.ms)))


def _shrunk(base: TransformerTower, heads: int, layers: int) -> TransformerTower:
    """Shrink a tower as `new_student` does: heads keep their size, the MLP its ratio."""
    width = heads * (base.width // base.heads)
    hidden = round(width * (base.hidden / base.width))
    return replace(base, width=width, heads=heads, hidden=hidden, layers=layers)


def _convolutional(
    teacher: TeacherSizes, families: Sequence[ImageFamilyName]
) -> Iterator[tuple[StudentShape, AnyTower]]:
    for family in families:
        for widths, depths in itertools.product(_CONV_WIDTHS, _CONV_DEPTHS):
            shape = StudentShape(family=family, conv_widths=widths, conv_depths=depths)
            tower = ConvTower(
                widths=widths,
                depths=depths,
                image_size=teacher.image_size,
                dim=teacher.dim,
                grn=family == "convnextv2",
            )
            if teacher.parameters(tower) <= teacher.whole[0]:
                yield shape, tower


_SCALES = (0.5, 1.0, 2.0)  # of a family's usual widths


def _unpredicted(
    teacher: TeacherSizes, known: Sequence[ImageFamilyName]
) -> tuple[tuple[UnpredictedStudent, ...], tuple[ImageFamilyName, ...]]:
    """Return towers of the families without probes, no larger than the teacher's; see the plan."""
    found: list[UnpredictedStudent] = []
    too_small: list[ImageFamilyName] = []
    for name, family in IMAGE_FAMILIES.items():
        if name in known:
            continue
        for scale in _SCALES:
            whole = family.whole
            widths = tuple(
                max(whole, round(width * scale / whole) * whole) for width in family.widths
            )
            try:
                with torch.device("meta"):  # counted, not made
                    tower: Any = image_tower(name, widths, None, teacher.image_size)
            except ConfigError:  # whatever the widths
                too_small.append(name)
                break
            count = sum(weight.numel() for weight in tower.parameters())
            count += tower.config.hidden_size * teacher.dim
            if count <= teacher.whole[0]:
                shape = StudentShape(family=name, conv_widths=widths, conv_depths=family.depths)
                found.append(
                    UnpredictedStudent(
                        shape=shape, parameters=count, share=count / teacher.whole[0]
                    )
                )
    found.sort(key=lambda item: -item.parameters)
    return tuple(found), tuple(too_small)


def describe(student: PlannedStudent | UnpredictedStudent) -> str:
    """Describe the sizes of a student in a few words."""
    if isinstance(student, UnpredictedStudent):
        shape = student.shape
        sizes = ("-".join(map(str, item or ())) for item in (shape.conv_widths, shape.conv_depths))
        return f"{shape.family} {', blocks '.join(sizes)}"
    tower = student.tower
    if isinstance(tower, ConvTower):
        widths, depths = ("-".join(map(str, item)) for item in (tower.widths, tower.depths))
        return f"ConvNeXt{' V2' * tower.grn} {widths}, blocks {depths}"
    heads, layers = tower.heads, tower.layers
    return (
        f"{heads} head{'s' * (heads > 1)} (width {tower.width}), {layers} layer{'s' * (layers > 1)}"
    )
