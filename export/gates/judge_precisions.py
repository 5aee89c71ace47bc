"""Judge on the test pairs whether fp32 tells inputs apart, and how near to it a precision is."""

import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.compress.data.sources import Source, relevance_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import (
    COLLAPSE_GATE,
    Bounds,
    GateOutcome,
    data_record,
    describe_missed,
    is_missed,
    judge_collapse,
    judge_gates,
    judge_usable,
    measure_cosines,
    measure_retrieval,
    measure_zero_shot,
    text_clusters,
)
from edgeclip.export.gates.zero_shot import ZeroShotSet
from edgeclip.export.graph.embedders import (
    TOWERS,
    PairEmbeddings,
    TowerGraph,
    embed_all,
    graph_embedder,
    tower_inputs,
)
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.manifest import DataRecord, GateRemark
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import pair_ranks
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.clusters import Clusters

TowerEmbeddings = Mapping[tuple[Tower, Precision], FloatArray]
_FIRST = 128  # pairs whose embeddings are compared, each with each


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateInputs:
    """Data that the gates need besides the embeddings of the test pairs.

    Attributes:
        data: describes the test pairs; None leaves that out of the records.
        relevance: which captions are right for which pictures; see `measure_retrieval`.
        zero_shot: labelled pictures; None if no picture has a label.
        labelled: embeddings of these pictures, float32 [N, dim], by the image tower's precision.
        clusters: integers, equal for pictures of the test pairs that belong together; None where
            all are independent.
        labelled_clusters: the same of the labelled pictures.
    """

    data: DataRecord | None = None
    relevance: Relevance | None = None
    zero_shot: ZeroShotSet | None = None
    labelled: Mapping[Precision, FloatArray] | None = None
    clusters: Clusters | None = None
    labelled_clusters: Clusters | None = None


@dataclass(frozen=True, slots=True)
class PrecisionVerdict:
    """The outcomes of all gates, and which precisions besides fp32 are inside them.

    Attributes:
        judged: every gate that was checked, including missed ones.
        kept: tower and precision of each graph that may be shipped.
        left_out: for each other graph, which gate it missed and by how much, or what is undecided.
        gate_remarks: the gates of kept precisions that were not judged.
    """

    judged: tuple[GateOutcome, ...]
    kept: frozenset[tuple[Tower, Precision]]
    left_out: tuple[str, ...]
    gate_remarks: tuple[GateRemark, ...] = ()


def embed_test_pairs(
    student: DualEncoder, graphs: Sequence[TowerGraph], test: Source, device: DeviceProfile
) -> dict[tuple[Tower, Precision], FloatArray]:
    """Embed the test pairs with every graph through the runtime's engine.

    Raises:
        EngineError: a graph cannot be run.
    """
    found: dict[tuple[Tower, Precision], FloatArray] = {}
    for tower in TOWERS:
        mine = [graph for graph in graphs if graph.tower == tower]
        inputs = tower_inputs(student, tower, test)
        for graph, embeddings in zip(mine, _embed(student, mine, inputs, device), strict=True):
            found[tower, graph.precision] = embeddings
    return found


def gate_inputs(
    student: DualEncoder,
    graphs: Sequence[TowerGraph],
    test: Source,
    zero_shot: ZeroShotSet | None,
    embeddings: TowerEmbeddings,
    device: DeviceProfile,
    clusters: Clusters | None = None,
) -> GateInputs:
    """Collect the inputs of the gates: embed the labelled pictures with every image graph.

    Args:
        student: the model whose towers are judged.
        graphs: graphs of both towers; only those of the image tower are run.
        test: the test pairs.
        zero_shot: labelled pictures, if there are any.
        embeddings: embeddings of the test pairs; pictures that are among them are not embedded
            again.
        device: runs the graphs.
        clusters: see `GateInputs`.

    Raises:
        EngineError: a graph cannot be run.
    """
    known = GateInputs(data=data_record(test), relevance=relevance_of(test), clusters=clusters)
    if zero_shot is None:
        return known
    mine = [graph for graph in graphs if graph.tower == "image"]
    rows = zero_shot.rows_of(test)
    if rows is not None:
        found = [embeddings["image", graph.precision][list(rows)] for graph in mine]
    else:
        inputs = tower_inputs(student, "image", zero_shot.source)
        found = _embed(student, mine, inputs, device)
    labelled = {graph.precision: item for graph, item in zip(mine, found, strict=True)}
    of_labelled = None if rows is None or clusters is None else clusters[list(rows)]
    return replace(known, zero_shot=zero_shot, labelled=labelled, labelled_clusters=of_labelled)


def _embed(
    student: DualEncoder,
    graphs: Sequence[TowerGraph],
    inputs: Iterator[NDArray[Any]],
    device: DeviceProfile,
) -> list[FloatArray]:
    if not graphs:
        return []
    embedders = [graph_embedder(graph, student.spec.image, device) for graph in graphs]
    name = f"{graphs[0].tower} tower"
    bar = tqdm(inputs, desc=name, unit="batch", disable=not sys.stderr.isatty())
    return embed_all(iter(bar), embedders)


def judge_precisions(
    embeddings: TowerEmbeddings,
    bounds: Mapping[Precision, Bounds],
    inputs: GateInputs | None = None,
    *,
    accept_undecided: bool = False,
    looks: int = 1,
) -> PrecisionVerdict:
    """Judge every precision against fp32.

    Each tower is judged alone, which for R@1 means with the other tower in fp32. If both may be
    shipped, they are judged together as well.

    Args:
        embeddings: embeddings of the test pairs, by tower and precision; both towers in fp32 are
            needed.
        bounds: the bounds of each precision.
        inputs: other data of the gates; by default neither data nor labels are known.
        accept_undecided: see `is_missed`.
        looks: see `judge_gates`.
    """
    inputs = inputs or GateInputs()
    judged: list[GateOutcome] = []
    kept: set[tuple[Tower, Precision]] = set()
    for precision in dict.fromkeys(item for _, item in embeddings if item != "fp32"):
        good: list[Tower] = []
        for tower in TOWERS:
            if (tower, precision) in embeddings:
                alone = judge_alone(tower, precision, embeddings, bounds[precision], inputs, looks)
                judged += alone
                missed = describe_missed(alone, accept_undecided=accept_undecided)
                good += [] if missed else [tower]
        if len(good) == len(TOWERS):
            chosen = dict.fromkeys(TOWERS, precision)
            together = judge_together(
                embeddings, chosen, bounds[precision], precision, inputs, looks
            )
            judged.append(together)
            good = [] if is_missed(together.record, accept_undecided=accept_undecided) else good
        kept |= {(tower, precision) for tower in good}
    remarks = _remarks(kept, inputs)
    if judged:
        reference = pair_embeddings(embeddings, dict.fromkeys(TOWERS, "fp32"))
        used = [bounds[precision].r1_loss for _, precision in embeddings if precision != "fp32"]
        remarks = (*remarks, *nothing_to_lose(reference, max(used), inputs.relevance))
    left_out = tuple(describe_missed(judged, accept_undecided=accept_undecided))
    return PrecisionVerdict(tuple(judged), frozenset(kept), left_out, remarks)


def judge_alone(
    tower: Tower,
    precision: Precision,
    embeddings: TowerEmbeddings,
    bounds: Bounds,
    inputs: GateInputs,
    looks: int = 1,
) -> tuple[GateOutcome, ...]:
    """Judge one tower in one precision, with the other in fp32.

    Most bundles are used like that: a device embeds pictures in int8, and searches an index that
    a workstation made in fp32. For `looks` see `judge_gates`.
    """
    mine, subject = embeddings[tower, precision], f"{tower} {precision}"
    whole = judge_usable(mine, inputs.data)
    if not whole.passed:  # then nothing can be compared
        return (GateOutcome(subject, whole),)
    reference = pair_embeddings(embeddings, dict.fromkeys(TOWERS, "fp32"))
    clusters = inputs.clusters
    if tower == "text":
        clusters = text_clusters(inputs.relevance, clusters)
    measured = list(measure_cosines(mine, reference.of(tower), bounds, inputs.data, clusters))
    if tower == "image" and inputs.zero_shot is not None and inputs.labelled is not None:
        found = inputs.labelled[precision], inputs.labelled["fp32"]
        zero, data = inputs.zero_shot, data_record(inputs.zero_shot.source)
        of_labelled = inputs.labelled_clusters
        measured.append(
            measure_zero_shot(*found, zero.labels, zero.targets, bounds, data, of_labelled)
        )
    swapped: dict[Tower, Precision] = {**dict.fromkeys(TOWERS, "fp32"), tower: precision}
    pairs, name = pair_embeddings(embeddings, swapped), describe_pairing(swapped)
    measured.append(
        measure_retrieval(
            pairs, reference, bounds, name, inputs.data, inputs.relevance, inputs.clusters
        )
    )
    records = (whole, *judge_gates(measured, looks))
    return tuple(GateOutcome(subject, record) for record in records)


def judge_together(
    embeddings: TowerEmbeddings,
    chosen: Mapping[Tower, Precision],
    bounds: Bounds,
    name: str,
    inputs: GateInputs,
    looks: int = 1,
) -> GateOutcome:
    """Judge the R@1 that both towers lose together, each in its precision of `chosen`."""
    candidate = pair_embeddings(embeddings, chosen)
    reference = pair_embeddings(embeddings, dict.fromkeys(TOWERS, "fp32"))
    measured = measure_retrieval(
        candidate, reference, bounds, name, inputs.data, inputs.relevance, inputs.clusters
    )
    (record,) = judge_gates([measured], looks)
    return GateOutcome("bundle", record)


def describe_pairing(chosen: Mapping[Tower, Precision]) -> str:
    """Name two towers of different precisions for a record: "int8 images, fp32 texts"."""
    return f"{chosen['image']} images, {chosen['text']} texts"


def pair_embeddings(
    embeddings: TowerEmbeddings, chosen: Mapping[Tower, Precision]
) -> PairEmbeddings:
    """Return the embeddings of both towers, each in its precision of `chosen`."""
    return PairEmbeddings(
        image=embeddings["image", chosen["image"]], text=embeddings["text", chosen["text"]]
    )


def nothing_to_lose(
    reference: PairEmbeddings, bound: float, relevance: Relevance | None = None
) -> tuple[GateRemark, ...]:
    """Return a remark if fp32 finds so little that embeddings of noise would pass the R@1 gate.

    Args:
        reference: the embeddings in fp32.
        bound: the allowed loss of R@1, in points of 100.
        relevance: see `measure_retrieval`.
    """
    if relevance is None:
        relevance = Relevance.of_texts_embedded(reference.text)
    found = float(pair_ranks(reference.image, reference.text, relevance).hits(1).mean())
    if 100 * (found - relevance.chance) > bound:
        return ()
    says = (
        f"fp32 itself finds {100 * found:.2g}% and noise would find "
        f"{100 * relevance.chance:.2g}%, so a loss of {bound:g} points cannot show"
    )
    return (GateRemark("bundle", "R@1 loss", says),)


def _remarks(kept: Iterable[tuple[Tower, Precision]], inputs: GateInputs) -> tuple[GateRemark, ...]:
    """Return remarks on kept image precisions if zero-shot was not judged."""
    if inputs.zero_shot is not None:
        return ()
    images = sorted(precision for tower, precision in kept if tower == "image")
    says = "not judged: no labels"
    return tuple(GateRemark(f"image {item}", "zero-shot top-1 loss", says) for item in images)


def judge_told_apart(
    student: DualEncoder, test: Source, embeddings: TowerEmbeddings
) -> tuple[tuple[GateOutcome, ...], tuple[GateRemark, ...]]:
    """Judge both towers in fp32 on the first pictures and texts of the test pairs.

    Returns:
        The outcomes, and a remark on each tower that could not be judged.

    Raises:
        InputError: a picture that cannot be read.
    """
    judged, remarks = [], []
    for tower in TOWERS:
        inputs = _inputs(student, tower, test)
        found = embeddings[tower, "fp32"][: len(inputs)]
        record = judge_collapse(found, inputs, data_record(test, len(inputs)))
        if record is None:
            says = "not judged: the test pairs hold one and the same"
            remarks.append(GateRemark(f"{tower} fp32", COLLAPSE_GATE.name, says))
        else:
            judged.append(GateOutcome(f"{tower} fp32", record))
    return tuple(judged), tuple(remarks)


def _inputs(student: DualEncoder, tower: Tower, test: Source) -> list[Hashable]:
    """Return what the first embeddings are of: pixels, or texts without case and spacing.

    A picture with several captions has as many texts, see `tower_inputs`.
    """
    if tower == "image":
        batches = tower_inputs(student, tower, test, count=_FIRST)
        return [pixels.tobytes() for batch in batches for pixels in batch]
    texts = (text for index in range(len(test)) for text in test.captions(index))
    return [" ".join(text.casefold().split()) for text in islice(texts, _FIRST)]
