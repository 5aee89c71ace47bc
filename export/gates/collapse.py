"""Judge that a tower gives different inputs different embeddings: a collapsed one does not."""

from collections.abc import Hashable, Sequence

import numpy as np

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import Gate, GateOutcome, data_record
from edgeclip.export.gates.judge_precisions import TowerEmbeddings
from edgeclip.export.graph.embedders import TOWERS, tower_inputs
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.manifest import DataRecord, GateRecord, GateRemark
from edgeclip.runtime.quality.intervals import bootstrap
from edgeclip.runtime.spec import Tower

# Most, not all: texts may differ only where they are cut, or in words that the tokenizer drops.
COLLAPSE_GATE = Gate("told apart", ">=", 0.9, "share")
COLLAPSE_HINT = (
    "Different inputs have the same embedding: tokenizer, config.json, processor and weights do "
    "not belong together, or the training collapsed"
)
_SAME = 1e-3  # largest distance of two embeddings that count as one
_FIRST = 128  # test pairs that are compared, each with each


def judge_collapse(
    embeddings: FloatArray, inputs: Sequence[Hashable], data: DataRecord | None = None
) -> GateRecord | None:
    """Judge the share of different inputs whose embedding is like that of no other.

    Args:
        embeddings: of length 1, float32 [N, dim].
        inputs: what each is the embedding of; equal inputs count once.
        data: describes them, for the record.

    Returns:
        The record; None if all inputs are equal, so that there is nothing to judge.
    """
    rows = list({item: row for row, item in enumerate(inputs)}.values())
    if len(rows) < 2:
        return None
    different = embeddings[rows].astype(np.float64)
    apart = np.linalg.norm(different[:, None] - different[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    return COLLAPSE_GATE.judge(bootstrap(apart.min(axis=1) > _SAME), data)


def judge_towers(
    student: DualEncoder, test: Source, embeddings: TowerEmbeddings
) -> tuple[tuple[GateOutcome, ...], tuple[GateRemark, ...]]:
    """Judge both towers in fp32 on the first test pairs.

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
    """Return what is embedded of the first pairs: pixels, or texts without case and spacing."""
    count = min(len(test), _FIRST)
    if tower == "image":
        batches = tower_inputs(student, tower, test, count=count)
        return [pixels.tobytes() for batch in batches for pixels in batch]
    return [" ".join(str(test.caption(index)).casefold().split()) for index in range(count)]
