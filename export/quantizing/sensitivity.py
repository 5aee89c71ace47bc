"""Which products of a tower suffer from being quantized: each alone, all others in float.

Two measures, both against the float tower on the same inputs. The divergence is that of the
softmax over cosines with the other tower's embeddings, times the logit scale: what a person
sees of an error, because it counts where answers are close (Kullback and Leibler 1951). The
cosine loss is 1 less the mean cosine of the embeddings. Both grow with the square of small
errors, so those of independent products nearly add up.

The inputs are calibration data. Measured on the test pairs, a choice by damage would make
the intervals of the last judgement too narrow.
"""

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.export.embed_pairs import FloatArray
from edgeclip.export.quantizing.node_groups import NodeGroup
from edgeclip.export.quantizing.switched_tower import SwitchedTower, switched_tower
from edgeclip.runtime.intervals import Interval, bootstrap
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.quality import cosines
from edgeclip.runtime.tower_feed import in_batches

Feed = Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]]

_BAD = 2.0  # times the mean damage of a group: then its nodes are measured one by one
_SPARED = 0.1  # of the worst node's damage: a group with one below that is taken apart
_COSINES_AT_ONCE = 1 << 21  # 16 MiB of float64


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDamage:
    """What quantizing one group alone does, with 95% intervals over the inputs.

    Attributes:
        title: the group, for people.
        nodes: names of its products.
        divergence: mean Kullback-Leibler divergence of a row from the float tower's, in nats.
        cosine_loss: 1 less the mean cosine with the float tower's embeddings.
    """

    title: str
    nodes: tuple[str, ...]
    divergence: Interval
    cosine_loss: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity(JsonRecord):
    """The damage of every group of a tower.

    Attributes:
        config: key of the config whose numbers were switched on.
        groups: the most damaging first.
        inputs: how many each was measured on.
        runs: how many inputs the tower was run on in all: in float and with each group, those
            that were taken apart then too.
        seconds: that it took.
    """

    SCHEMA_VERSION: ClassVar[int] = 3
    WHAT: ClassVar[str] = "sensitivities"
    MEND: ClassVar[str] = "delete it and search again"

    config: str
    groups: tuple[GroupDamage, ...]
    inputs: int
    runs: int
    seconds: float

    @property
    def rate(self) -> float:
        """Runs a second."""
        return self.runs / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """What damage is measured with.

    Attributes:
        inputs: batches [n, ...] of the tower's inputs.
        others: the other tower's embeddings of the same pairs, float32 [N, dim].
        logit_scale: of the model.
        feed: names a batch as the graph takes it.
        output: which of the graph's outputs is the embedding.
        batch: the only batch size that the graph takes; None for any.
        threads: of the session.
    """

    inputs: Sequence[NDArray[Any]]
    others: FloatArray
    logit_scale: float
    feed: Feed
    output: str
    batch: int | None = None
    threads: int = 1


def measure_damage(
    source: Path, written: Path, groups: Sequence[NodeGroup], probe: Probe, *, config: str = ""
) -> Sensitivity:
    """Measure each group alone; a bad one is taken apart if some of its nodes are not to blame.

    A terminal sees inputs per second and the time left. Memory holds the embeddings of all
    groups, and one batch at a time.

    Args:
        source: the tower in fp32.
        written: the same with all groups quantized.
        groups: what to switch on; of one that `written` quantizes in part, each product alone.
        probe: what is measured with.
        config: key of the config that `written` has.

    Raises:
        ExportError: `written` quantizes nothing.
        EngineError: ONNX Runtime cannot run a graph.
    """
    began = time.monotonic()
    with switched_tower(source, written, threads=probe.threads) as tower:
        there = _switchable(groups, tower.nodes)
        found = _damages(tower, there, probe)
        bad = _bad(there, found)
        for group in bad:
            singles = _damages(tower, group.singles(), probe)
            worst = max(item.divergence.value for item in singles)
            if min(item.divergence.value for item in singles) < _SPARED * worst:
                found = [item for item in found if item.nodes != group.nodes] + singles
    inputs = sum(map(len, probe.inputs))
    passes = [len(there), *(len(group.nodes) for group in bad)]
    return Sensitivity(
        config=config,
        groups=tuple(sorted(found, key=lambda item: -item.divergence.value)),
        inputs=inputs,
        runs=inputs * sum(count + 1 for count in passes if count),  # one more in float
        seconds=time.monotonic() - began,
    )


def row_divergence(
    found: FloatArray, reference: FloatArray, others: FloatArray, logit_scale: float
) -> NDArray[np.float64]:
    """Divergence of each row's softmax over `others` from the reference's: float64 [N], nats.

    Args:
        found, reference: embeddings [N, dim] of the same inputs.
        others: what they are compared with [M, dim].
        logit_scale: multiplies the cosines.
    """
    targets = logit_scale * others.astype(np.float64).T
    result = np.empty(len(found))
    step = max(1, _COSINES_AT_ONCE // len(others))
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        right = _log_softmax(reference[rows] @ targets)
        result[rows] = (np.exp(right) * (right - _log_softmax(found[rows] @ targets))).sum(axis=1)
    return np.maximum(result, 0.0)  # rounding can go below what is 0


def _switchable(groups: Sequence[NodeGroup], nodes: Collection[str]) -> list[NodeGroup]:
    """Groups all of whose nodes have a switch, and the single nodes that have one of the others.

    Of three products of one value, one may stay in float because fp16 cannot hold its result.
    """
    found: list[NodeGroup] = []
    for group in groups:
        singles = [single for single in group.singles() if single.nodes[0] in nodes]
        found += [group] if len(singles) == len(group.nodes) else singles
    return found


def _damages(tower: SwitchedTower, groups: Sequence[NodeGroup], probe: Probe) -> list[GroupDamage]:
    if not groups:
        return []
    reference, *embedded = _embed(tower, groups, probe)
    return [
        GroupDamage(
            title=group.title,
            nodes=group.nodes,
            divergence=bootstrap(row_divergence(found, reference, probe.others, probe.logit_scale)),
            cosine_loss=bootstrap(1 - cosines(found, reference)),
        )
        for group, found in zip(groups, embedded, strict=True)
    ]


def _embed(tower: SwitchedTower, groups: Sequence[NodeGroup], probe: Probe) -> list[FloatArray]:
    """Embed all inputs in float, then with each group quantized: float32 [N, dim] each."""
    wanted: list[tuple[str, ...]] = [(), *(group.nodes for group in groups)]
    parts: list[list[FloatArray]] = [[] for _ in wanted]
    total = len(wanted) * sum(map(len, probe.inputs))
    hidden = not sys.stderr.isatty()
    with tqdm(desc="sensitivity", total=total, unit="input", leave=False, disable=hidden) as bar:
        for values in probe.inputs:
            for part, nodes in zip(parts, wanted, strict=True):
                part.append(_run(tower, values, nodes, probe))
                bar.update(len(values))
    return [np.concatenate(part) for part in parts]


def _run(
    tower: SwitchedTower, values: NDArray[Any], nodes: tuple[str, ...], probe: Probe
) -> FloatArray:
    return in_batches(
        lambda piece: tower.run(probe.feed(piece), nodes), values, static=probe.batch
    )[probe.output]


def _bad(groups: Sequence[NodeGroup], found: Sequence[GroupDamage]) -> list[NodeGroup]:
    """Groups of several nodes whose damage stands out."""
    limit = _BAD * np.mean([item.divergence.value for item in found])
    return [
        group
        for group, item in zip(groups, found, strict=True)
        if len(group.nodes) > 1 and item.divergence.value > limit
    ]


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
