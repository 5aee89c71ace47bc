"""Which precisions are inside their gates: embeddings of the test pairs, then a verdict."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source
from edgeclip.export.embed_pairs import (
    FloatArray,
    PairEmbeddings,
    embed_all,
    graph_embedder,
    tower_inputs,
)
from edgeclip.export.gates import Bounds, Judged, judge_retrieval, judge_tower, missed
from edgeclip.export.tower_graph import TOWERS, TowerGraph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.spec import Precision, Tower

TowerEmbeddings = Mapping[tuple[Tower, Precision], FloatArray]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates say of the precisions other than fp32.

    Attributes:
        judged: every gate that was checked, those that were missed among them.
        kept: tower and precision of each graph that is inside its gates.
        left_out: for each of the others, which gate it missed and by how much.
    """

    judged: tuple[Judged, ...]
    kept: frozenset[tuple[Tower, Precision]]
    left_out: tuple[str, ...]


def embed_test(
    student: DualEncoder, graphs: Sequence[TowerGraph], test: Source, device: DeviceProfile
) -> dict[tuple[Tower, Precision], FloatArray]:
    """Embed the test pairs with every graph through the runtime's engine.

    Raises:
        EngineError: a graph cannot be run.
    """
    found: dict[tuple[Tower, Precision], FloatArray] = {}
    for tower in TOWERS:
        mine = [graph for graph in graphs if graph.tower == tower]
        embedders = [graph_embedder(graph, student.spec.image, device) for graph in mine]
        inputs = tower_inputs(test, tower, student.spec, student.text_tokenizer)
        bar = tqdm(inputs, desc=f"{tower} tower", unit="batch", disable=not sys.stderr.isatty())
        for graph, embeddings in zip(mine, embed_all(iter(bar), embedders), strict=True):
            found[tower, graph.precision] = embeddings
    return found


def judge_precisions(embeddings: TowerEmbeddings, bounds: Mapping[Precision, Bounds]) -> Verdict:
    """Hold every precision against fp32.

    Each tower is judged by itself. What is left of a precision is then judged together:
    R@1 with both towers swapped, a tower that missed its own gates staying in fp32.
    """
    judged: list[Judged] = []
    kept: set[tuple[Tower, Precision]] = set()
    left_out: list[str] = []
    for precision in dict.fromkeys(item for _, item in embeddings if item != "fp32"):
        towers = _judge_towers(embeddings, precision, bounds[precision])
        good = [tower for tower, items in towers.items() if not missed(items)]
        judged += [item for items in towers.values() for item in items]
        left_out += [miss for items in towers.values() for miss in missed(items)]
        if not good:
            continue
        chosen: dict[Tower, Precision] = {
            tower: precision if tower in good else "fp32" for tower in TOWERS
        }
        together = judge_together(embeddings, chosen, bounds[precision], precision)
        judged.append(together)
        left_out += missed([together])
        if together.record.passed:
            kept |= {(tower, precision) for tower in good}
    return Verdict(tuple(judged), frozenset(kept), tuple(left_out))


def judge_together(
    embeddings: TowerEmbeddings, chosen: Mapping[Tower, Precision], bounds: Bounds, name: str
) -> Judged:
    """Judge the R@1 that both towers lose together, each in its precision of `chosen`."""
    candidate = pair_embeddings(embeddings, chosen)
    reference = pair_embeddings(embeddings, dict.fromkeys(TOWERS, "fp32"))
    return Judged("bundle", judge_retrieval(candidate, reference, bounds, name))


def pair_embeddings(
    embeddings: TowerEmbeddings, chosen: Mapping[Tower, Precision]
) -> PairEmbeddings:
    """Return the embeddings of both towers, each in its precision of `chosen`."""
    return PairEmbeddings(
        image=embeddings["image", chosen["image"]], text=embeddings["text", chosen["text"]]
    )


def _judge_towers(
    embeddings: TowerEmbeddings, precision: Precision, bounds: Bounds
) -> dict[Tower, list[Judged]]:
    found: dict[Tower, list[Judged]] = {}
    for tower in TOWERS:
        records = judge_tower(embeddings[tower, precision], embeddings[tower, "fp32"], bounds)
        found[tower] = [Judged(f"{tower} {precision}", record) for record in records]
    return found
