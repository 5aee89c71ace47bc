"""What `edgeclip diagnose` found: the figures of all models, their layers, groups and words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeclip.compress.diagnose.groups import GroupQuality
from edgeclip.compress.diagnose.reliability import Calibration
from edgeclip.compress.diagnose.similarity import LEAST_ITEMS, MutualInformation
from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval

Kind = Literal[
    "broken layer",
    "shuffled captions",
    "tower at chance",
    "wrong colours",
    "group behind",
    "concept lost",
    "too sure",
    "outside the world",
    "precision",
    "too few pictures",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that the data show, and what to try.

    Attributes:
        kind: what it is, one of a short list.
        subject: the model, tower, layer or group that it is about.
        title: one sentence.
        evidence: the figures behind it, with intervals.
        advice: what to try next.
    """

    kind: Kind
    subject: str
    title: str
    evidence: tuple[str, ...]
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerAgreement:
    """How well one tower agrees with the teacher's on the same items.

    Attributes:
        cosine: mean cosine to the teacher's embedding.
        told_apart: the chance that an embedding is closer to the teacher's of its own item than to
            that of another: 0.5 for a tower that knows nothing of its items.
        towards_mean: mean cosine to the direction of the teacher's mean embedding.
        teacher_towards_mean: the same of the teacher's own embeddings.
        neighbours: agreement of the 10 nearest neighbours, above chance.
        information: Gaussian mutual information.
    """

    cosine: Interval | None
    told_apart: Interval | None
    towards_mean: Interval | None
    teacher_towards_mean: Interval | None
    neighbours: Interval
    information: MutualInformation


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptScore:
    """How often pictures fit their captions better than with another word of a family in place.

    Attributes:
        family, word: the word; "" for all words of the family.
        pictures: how many.
        right: share, with interval.
        lost: the teacher's share less this one; None for the teacher.
    """

    family: str
    word: str
    pictures: int
    right: Interval
    lost: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """A word of a group's pictures that a model reads as another.

    Attributes:
        column, group: which pictures.
        word, read_as: the caption's word, and what is chosen most often instead.
        pictures: with that word in that group.
        share: of these, what is read as `read_as`.
        teacher: the same of the teacher.
        more: the share less the teacher's.
    """

    column: str
    group: str
    word: str
    read_as: str
    pictures: int
    share: Interval
    teacher: Interval
    more: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosedModel:
    """The figures of one model.

    Attributes:
        name: "teacher", "student", or a precision of the bundle.
        r1: R@1, mean of both directions.
        kept: of the teacher's; None for the teacher.
        kept_of_exact: of the R@1 of `exact_of` all models, for each other precision; None where
            there is no such model.
        image, text: agreement with the teacher's towers; None for the teacher, and of texts where
            too few first captions are distinct.
        gap: modality gap.
        alignment: of pictures and their first captions.
        image_uniformity, text_uniformity: of each tower.
        calibration: of the best text of each picture.
        outside: AUROC of telling known pictures from others by their best cosine.
        outside_lost: the teacher's less this one.
        concepts: scores by word.
        groups: what is kept of each group.
        confusions: colours read as others, of all groups.
    """

    name: str
    r1: Interval
    kept: Interval | None
    kept_of_exact: Interval | None
    image: TowerAgreement | None
    text: TowerAgreement | None
    gap: Interval
    alignment: Interval
    image_uniformity: Interval
    text_uniformity: Interval
    calibration: Calibration
    outside: Interval | None
    outside_lost: Interval | None
    concepts: tuple[ConceptScore, ...]
    groups: tuple[GroupQuality, ...]
    confusions: tuple[Confusion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """A layer of the student.

    Attributes:
        number: from 1.
        best: the teacher's layer that is most alike, from 1.
        cka: linear CKA with it.
        cosine: mean cosine of the hidden states to those of that layer, where widths are equal.
        noise: whether its weights have the spectrum of random ones, in a tower with trained ones.
        gain_without: what the cosine to the teacher's embedding gains where the layer is left out.
        does_harm: whether that is above 0, by Holm's method over the layers of the tower.
    """

    number: int
    best: int
    cka: Interval
    cosine: Interval | None
    noise: bool
    gain_without: Interval | None
    does_harm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLayers:
    """The layers of one tower of student and teacher.

    Attributes:
        tower: image or text.
        items: how many were looked at.
        layers: of the student.
        cka: of each layer of the student with each of the teacher's.
        entropy, teacher_entropy: attention entropy of each layer and head, 0 to 1; None where a
            tower has no attention.
    """

    tower: Tower
    items: int
    layers: tuple[LayerFigures, ...]
    cka: tuple[tuple[float, ...], ...]
    entropy: tuple[tuple[float, ...], ...] | None
    teacher_entropy: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(JsonRecord):
    """All figures, and what they show.

    Attributes:
        data: name of the pictures.
        pictures, captions: how many.
        distinct: how many of the pictures' first captions differ.
        left_out: pictures without a caption, and others that were not drawn.
        outside: what the pictures from outside are, and how many.
        same_space: whether the student lives in its teacher's space, so that cosines mean anything.
        models: teacher first.
        towers: layers; without a student none.
        findings: what the data show.
    """

    SCHEMA_VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "a diagnosis"
    HINT: ClassVar[str] = "make it again with edgeclip diagnose"

    data: str
    pictures: int
    captions: int
    distinct: int
    left_out: str
    outside: str
    same_space: bool
    models: tuple[DiagnosedModel, ...]
    towers: tuple[TowerLayers, ...]
    findings: tuple[Finding, ...]


def exact_of(names: Sequence[str]) -> str | None:
    """Return which model a bundle's precisions are compared with: fp32, else the student."""
    return next((name for name in ("fp32", "student") if name in names), None)


def headline(found: Diagnosis) -> str:
    """Say in one sentence what was found."""
    faults = [item for item in found.findings if item.kind != "too few pictures"]
    if faults:
        return "1 finding" if len(faults) == 1 else f"{len(faults)} findings"
    return "No fault was found" + (" in what could be compared" if not_compared(found) else "")


def not_compared(found: Diagnosis) -> tuple[str, ...]:
    """Say which figures are left out, and why: a sentence each."""
    told = []
    if not found.same_space:
        told.append(
            "Not every model is in its teacher's space, so cosines to the teacher, words and what "
            "a layer is worth are left out for those."
        )
    if found.distinct < LEAST_ITEMS:
        told.append(
            f"Only {found.distinct} of the pictures' first captions are distinct, so no text tower "
            f"is compared with the teacher's: that needs {LEAST_ITEMS}."
        )
    names = [model.name for model in found.models]
    if len(names) > 1 and exact_of(names) is None:
        told.append(
            f"{', '.join(names[1:])}: compared with the teacher alone, as there is neither fp32 "
            "nor a student (`--student`) whose quality a precision could lose."
        )
    return tuple(told)
