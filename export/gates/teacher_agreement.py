"""Judge whether a student is in its teacher's embedding space, on pairs that it never saw."""

import sys
from dataclasses import dataclass, replace

from tqdm import tqdm

from edgeclip.compress.data.sources import Source, relevance_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import (
    Bounds,
    Gate,
    GateOutcome,
    MeasuredGate,
    data_record,
    judge_gates,
    judge_usable,
    measure_cosines,
    text_clusters,
)
from edgeclip.export.graph.embedders import (
    TOWERS,
    PairEmbeddings,
    embed_all,
    torch_embedder,
    tower_inputs,
)
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.manifest import (
    COSINE_TO_TEACHER,
    P1_COSINE_TO_TEACHER,
    R1_KEPT,
    DataRecord,
    GateRemark,
)
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.clusters import Clusters
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share

_FEWEST_FOUND = 20  # below, the share that is kept may be nearly anything


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBounds:
    """The bounds within which a student is in its teacher's embedding space.

    Attributes:
        mean_cosine: the smallest allowed mean cosine of each tower to the teacher's.
        p1_cosine: the smallest allowed 1st percentile of these cosines.
        r1_kept: the smallest allowed share of the teacher's R@1 (mean of both directions).

    Raises:
        ConfigError: a cosine outside -1 to 1, or a share below 0.
    """

    mean_cosine: float = 0.8
    p1_cosine: float = 0.5
    r1_kept: float = 0.8

    def __post_init__(self) -> None:
        for name in ("mean_cosine", "p1_cosine"):
            if not -1 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a cosine, from -1 to 1, not {getattr(self, name)}")
        if not 0 <= self.r1_kept < float("inf"):
            raise ConfigError(f"r1_kept is a share of the teacher's R@1, not {self.r1_kept}")


@dataclass(frozen=True, slots=True)
class TeacherAgreement:
    """The outcomes of the gates between student and teacher, and what could not be judged."""

    judged: tuple[GateOutcome, ...]
    remarks: tuple[GateRemark, ...] = ()


def judge_agreement(
    student: DualEncoder,
    teacher: DualEncoder,
    test: Source,
    bounds: TeacherBounds,
    *,
    text_tower: bool = True,
    looks: int = 1,
    clusters: Clusters | None = None,
) -> TeacherAgreement:
    """Embed the test pairs with both models in torch, and judge the student's towers.

    The records are about the fp32 towers, whose graphs must equal torch to be in a bundle. Without
    a text tower, the student's images are searched among the teacher's texts, as label sets and
    indexes of the teacher will be. For `looks` see `judge_gates`,
    for `clusters` `GateInputs`.

    Raises:
        ConfigError: pairs without captions, or embeddings of another length than the teacher's.
        InputError: a picture that cannot be read.
    """
    if student.spec.dim != teacher.spec.dim:
        raise ConfigError(
            f"the teacher embeds to {teacher.spec.dim} numbers, the student to "
            f"{student.spec.dim}: they cannot share a space"
        )
    towers: tuple[Tower, ...] = TOWERS if text_tower else ("image",)
    theirs = {tower: _embed(teacher, "teacher", tower, test) for tower in TOWERS}
    ours = {tower: _embed(student, "student", tower, test) for tower in towers}
    data = data_record(test)
    usable = {tower: judge_usable(ours[tower], data) for tower in towers}
    if not all(record.passed for record in usable.values()):  # they have no ranks
        return TeacherAgreement(
            tuple(GateOutcome(f"{tower} fp32", record) for tower, record in usable.items())
        )
    relevance = relevance_of(test)
    of_tower = {"image": clusters, "text": text_clusters(relevance, clusters)}
    measured = [
        (f"{tower} fp32", item)
        for tower in towers
        for item in _measure_tower(ours[tower], theirs[tower], bounds, data, of_tower[tower])
    ]
    reference = PairEmbeddings(theirs["image"], theirs["text"])
    candidate = PairEmbeddings(ours["image"], ours.get("text", theirs["text"]))
    kept = measure_kept(candidate, reference, relevance, bounds, data, clusters)
    remarks = (kept,) if isinstance(kept, GateRemark) else ()
    measured += [] if isinstance(kept, GateRemark) else [("bundle", kept)]
    records = judge_gates([item for _, item in measured], looks)
    judged = zip([subject for subject, _ in measured], records, strict=True)
    return TeacherAgreement(tuple(GateOutcome(*pair) for pair in judged), remarks)


def _embed(model: DualEncoder, role: str, tower: Tower, test: Source) -> FloatArray:
    inputs = tower_inputs(model, tower, test)
    bar = tqdm(inputs, desc=f"{role}, {tower} tower", unit="batch", disable=not sys.stderr.isatty())
    (found,) = embed_all(iter(bar), [torch_embedder(model, tower)])
    return found


def _measure_tower(
    student: FloatArray,
    teacher: FloatArray,
    bounds: TeacherBounds,
    data: DataRecord,
    clusters: Clusters | None,
) -> list[MeasuredGate]:
    held = Bounds(mean_cosine=bounds.mean_cosine, p1_cosine=bounds.p1_cosine)
    names = (COSINE_TO_TEACHER, P1_COSINE_TO_TEACHER)
    return [
        replace(measured, gate=replace(measured.gate, name=name))
        for name, measured in zip(
            names, measure_cosines(student, teacher, held, data, clusters), strict=True
        )
    ]


def measure_kept(
    student: PairEmbeddings,
    teacher: PairEmbeddings,
    relevance: Relevance,
    bounds: TeacherBounds,
    data: DataRecord,
    clusters: Clusters | None = None,
) -> MeasuredGate | GateRemark:
    """Measure the share of the teacher's R@1 that the student keeps.

    A teacher that finds hardly more than chance would has no R@1 to keep: then only the cosines
    tell, and a remark says so.
    """
    both = (teacher, student)
    theirs, ours = (pair_ranks(item.image, item.text, relevance).hits(1) for item in both)
    found = float(theirs.sum())
    if found < _FEWEST_FOUND or estimate_share(theirs, clusters).interval.low <= relevance.chance:
        few = len(theirs) < 2 * _FEWEST_FOUND
        mend = "give more test pairs" if few else "test on pairs that it knows"
        says = (
            f"not judged: the teacher itself finds {found:g} of {len(theirs)} pairs, so only "
            f"cosines tell whether the student is in its space: {mend}"
        )
        return GateRemark("bundle", R1_KEPT, says)
    gate = Gate(R1_KEPT, ">=", bounds.r1_kept, "share")
    return MeasuredGate(gate=gate, estimate=estimate_kept(ours, theirs, clusters), data=data)
