"""Judge shorter and coarser embeddings: what they keep of the R@1 of the full ones."""

from dataclasses import dataclass

import numpy as np

from edgeclip.export.gates.gates import Gate, GateOutcome, MeasuredGate, judge_gates
from edgeclip.export.gates.judge_precisions import GateInputs
from edgeclip.export.graph.embedders import PairEmbeddings
from edgeclip.runtime.bundle.manifest import GateRemark, ReducedForm
from edgeclip.runtime.bundle.reduction import Basis, Reducer, RowType
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import Ranks, pair_ranks
from edgeclip.runtime.stats.shares import estimate_kept

# The smallest allowed share of the full embeddings' R@1, mean of both directions.
KEPT_BOUNDS: dict[RowType, float] = {"float32": 0.95, "int8": 0.95, "binary": 0.9}
R1_KEPT_OF_FULL = "R@1 kept of the full embeddings'"
_FEWEST_FOUND = 20  # below, the share that is kept may be nearly anything


@dataclass(frozen=True, slots=True)
class ReducedForms:
    """The outcome of each form's gate, and why forms were not judged."""

    judged: tuple[GateOutcome, ...] = ()
    remarks: tuple[GateRemark, ...] = ()


def judge_reduced(
    full: PairEmbeddings, basis: Basis, inputs: GateInputs, looks: int = 1
) -> ReducedForms:
    """Judge each form that a basis has on the test pairs; for `looks` see `judge_gates`.

    Args:
        full: what both towers embed, each in the precision that ships.
        basis: of the same embedding space.
        inputs: the test pairs.
    """
    relevance = inputs.relevance or Relevance.of_texts_embedded(full.text)
    reference = pair_ranks(full.image, full.text, relevance).hits(1)
    found = float(reference.sum())
    if found < _FEWEST_FOUND:
        says = (
            f"no shorter or coarser embeddings, which were not judged: the full ones find {found:g}"
            f" of {len(reference)} pairs: give more test pairs"
        )
        return ReducedForms((), (GateRemark("bundle", R1_KEPT_OF_FULL, says),))
    judged = []
    for form in basis.forms:
        kept = reduced_ranks(full, basis.reducer(form), relevance).hits(1)
        gate = Gate(R1_KEPT_OF_FULL, ">=", KEPT_BOUNDS[form.dtype], "share")
        estimate = estimate_kept(kept, reference, inputs.clusters)
        measured = MeasuredGate(gate=gate, estimate=estimate, data=inputs.data)
        judged.append(GateOutcome(str(form), judge_gates([measured], looks)[0]))
    return ReducedForms(tuple(judged))


def reduced_ranks(full: PairEmbeddings, reducer: Reducer, relevance: Relevance) -> Ranks:
    """Rank the answers among rows of a form, by queries that are reduced and not quantized."""
    image, text = (reducer.reduce(own) for own in (full.image, full.text))
    images, texts = (
        reducer.restore(reducer.rows(own)).astype(np.float64) for own in (full.image, full.text)
    )
    return Ranks(
        pair_ranks(image, texts, relevance).image_to_text,
        pair_ranks(images, text, relevance).text_to_image,
        relevance.owner,
    )


def forms_of(basis: Basis, gates: tuple[GateOutcome, ...]) -> tuple[ReducedForm, ...]:
    """Return the forms whose gate is among those that hold, with it."""
    found = {item.subject: item.record for item in gates}
    return tuple(
        ReducedForm(form, (found[str(form)],)) for form in basis.forms if str(form) in found
    )
