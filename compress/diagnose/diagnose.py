"""Diagnose a student: measure all models on the same pictures, and say what the figures show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from edgeclip.compress.data.picture_groups import Groups
from edgeclip.compress.data.sources import EmojiSource, Source
from edgeclip.compress.diagnose.diagnosis import Diagnosis, TowerLayers
from edgeclip.compress.diagnose.findings import find
from edgeclip.compress.diagnose.measure import (
    BundleEmbedder,
    Embedder,
    LooksAt,
    Measuring,
    ModelEmbedder,
    Questions,
    embed_all,
    measure_layers,
)
from edgeclip.compress.diagnose.reliability import dead_leaves
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.encoder import Encoder

_LEAVES = 200  # pictures that stand for what is outside, where none are given


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What is diagnosed, and on what.

    Attributes:
        teacher: the model to compare with.
        student: None where only a bundle is looked at.
        encoders: a bundle's, by precision.
        source: pictures that all have captions, 40 at least.
        groups: of these.
        outside: pictures from outside; None draws some.
        left_out: what `source` does not hold, in words.
        seed: of every draw.
    """

    teacher: DualEncoder
    student: DualEncoder | None
    encoders: Mapping[str, Encoder]
    source: Source
    groups: tuple[Groups, ...]
    outside: Source | None
    left_out: str = ""
    seed: int = 0


def diagnose(given: Inputs) -> tuple[Diagnosis, LooksAt | None]:
    """Measure everything; also return where teacher and student look in a few pictures."""
    source, teacher = given.source, given.teacher
    models: dict[str, Embedder] = {"teacher": ModelEmbedder(teacher)}
    in_space = set()
    if given.student is not None:
        models["student"] = ModelEmbedder(given.student)
        in_space |= {"student"} if given.student.space == teacher.space else set()
    for precision, encoder in given.encoders.items():
        models[precision] = BundleEmbedder(encoder)
        in_space |= {precision} if encoder.space == teacher.space else set()
    outside, outside_name = _outside(given)
    embedded = embed_all(models, source, outside)
    captions = [source.captions(index)[0] for index in range(len(source))]
    questions = Questions.of(teacher, captions, given.seed)
    measuring = Measuring.of(source, given.groups, questions, in_space, given.seed)
    measured = measuring.qualities(embedded)
    bar = tqdm(measured, "figures", total=len(embedded), unit="model", dynamic_ncols=True)
    qualities = list(bar)
    towers: tuple[TowerLayers, ...] = ()
    looks = None
    if given.student is not None:
        towers, looks = measure_layers(
            given.student, teacher, source, in_space="student" in in_space, seed=given.seed
        )
    sizes = [
        int(size)
        for item in given.groups
        for size in np.bincount(item.number[item.number >= 0], minlength=len(item.names))
    ]
    diagnosis = Diagnosis(
        data=source.name,
        pictures=len(source),
        captions=len(embedded[0].text),
        distinct=len(measuring.distinct),
        left_out=given.left_out,
        outside=outside_name,
        same_space=in_space == set(models) - {"teacher"},
        models=tuple(qualities),
        towers=towers,
        findings=find(qualities, towers, sizes),
    )
    return diagnosis, looks


def _outside(given: Inputs) -> tuple[Source | Sequence[Image.Image], str]:
    if given.outside is None:
        leaves = dead_leaves(_LEAVES, given.teacher.image_spec.size, seed=given.seed)
        return leaves, f"{_LEAVES} drawn pictures of discs, which show nothing that captions name"
    if isinstance(given.outside, EmojiSource):
        return given.outside, f"{len(given.outside)} scenes of emoji that no other split shows"
    return given.outside, given.outside.name
