"""What shorter and coarser embeddings keep, judged."""

import numpy as np

from edgeclip.export.gates.judge_precisions import GateInputs
from edgeclip.export.gates.reduced_forms import forms_of, judge_reduced, reduced_ranks
from edgeclip.export.graph.embedders import PairEmbeddings
from edgeclip.runtime.bundle.reduction import Form, make_basis
from edgeclip.runtime.quality.relevance import Relevance

DIM, COUNT = 16, 400


def pairs(held: int) -> PairEmbeddings:
    """Image and text of a pair are near; all that tells pairs apart is in `held` dimensions."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(COUNT, DIM))
    rows[:, held:] *= 1e-3
    both = [rows, rows + 0.1 * random.normal(size=rows.shape)]
    image, text = (own / np.linalg.norm(own, axis=1, keepdims=True) for own in both)
    return PairEmbeddings(image=image.astype(np.float32), text=text.astype(np.float32))


def test_what_holds_ships_and_what_does_not_is_left_out() -> None:
    full = pairs(held=8)
    wide = full.image.astype(np.float64)
    basis = make_basis(wide.T @ wide, "5" * 64, (8, 2))
    found = judge_reduced(full, basis, GateInputs(relevance=Relevance.of_pairs(COUNT)))
    outcome = {item.subject: item.record for item in found.judged}
    assert outcome["8 float32"].passed
    assert outcome["8 int8"].passed
    assert outcome["2 float32"].outcome == "failed"
    assert outcome["2 binary"].outcome == "failed"
    held = tuple(item for item in found.judged if item.record.passed)
    shipped = [item.form for item in forms_of(basis, held)]
    assert Form(8, "float32") in shipped
    assert Form(2, "float32") not in shipped


def test_both_directions_are_ranked() -> None:
    full = PairEmbeddings(
        image=np.array([[0.8, 0.6], [-0.8, 0.6]], np.float32),
        text=np.array([[0.6, 0.8], [-0.6, 0.8]], np.float32),
    )
    basis = make_basis(np.diag([2.0, 1.0]), "5" * 64, (2,))
    ranks = reduced_ranks(full, basis.reducer(Form(2, "int8")), Relevance.of_pairs(2))
    assert ranks.image_to_text.tolist() == [1, 1]
    assert ranks.text_to_image.tolist() == [1, 1]


def test_too_few_to_judge_is_said() -> None:
    rows = np.eye(8, DIM, dtype=np.float32)
    basis = make_basis(np.eye(DIM), "5" * 64, (8,))
    found = judge_reduced(PairEmbeddings(image=rows, text=rows), basis, GateInputs())
    assert not found.judged
    assert "8 of 8 pairs" in found.remarks[0].says
