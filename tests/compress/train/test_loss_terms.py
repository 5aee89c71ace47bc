"""The numbers on the right are worked by hand, in the comments, not by another program.

`test_losses.py` has the losses that are on by default.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.nn.functional import normalize

from edgeclip.compress.train.loss_terms import (
    Bank,
    RowWeights,
    TeacherRows,
    affinity_loss,
    contrastive_loss,
    feature_loss,
    hard_negative_loss,
    interactive_loss,
    logit_loss,
    orthogonality_loss,
    patch_loss,
    relational_loss,
    sigmoid_loss,
    vertical_loss,
)
from edgeclip.compress.train.losses import TERMS, LossWeights, distillation_losses
from edgeclip.runtime.errors import ConfigError

# Two pairs in two dimensions, and one more caption; 0.6 and 0.8 have length 1.
IMAGE = tensor([[1.0, 0.0], [0.0, 1.0]])
TEXT = tensor([[0.6, 0.8], [0.0, 1.0]])
TEACHER = TeacherRows(
    image=tensor([[1.0, 0.0], [0.8, 0.6]]), text=tensor([[1.0, 0.0], [0.0, 1.0]]), scale=2.0
)
SIGLIP = TeacherRows(image=TEACHER.image, text=TEACHER.text, scale=2.0, bias=-1.0)
# Cosines to the third text: of the student's pictures 0.8 and 0.6, of the teacher's 0.8 and 1.
BANK = Bank(texts=[tensor([[0.8, 0.6]])], same=tensor([[False], [False]]))
OWN = Bank(texts=BANK.texts, same=tensor([[False], [True]]))  # it is the second one's caption


def _softmax(*logits: float) -> list[float]:
    whole = sum(map(math.exp, logits))
    return [math.exp(own) / whole for own in logits]


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _about(value: float) -> object:
    return pytest.approx(value, abs=2e-6)


# The columns of a batch, texts that look for images, as in `test_losses.py`: the bank has no part.
COLUMNS = [
    _sigmoid(0.4) * _kl(_softmax(2, 1.6), _softmax(1.2, 1.6)),
    _sigmoid(1.2) * _kl(_softmax(0, 1.2), _softmax(0, 2)),
]


def test_the_feature_loss_is_a_squared_distance() -> None:
    # |(0, 1) - (.8, .6)|^2 = .64 + .16 = .8 and 0, in the mean .4; times 2.5 is 1.
    distance = (IMAGE - TEACHER.image).square().sum(dim=1).mean().item()
    assert distance == _about(0.4)
    assert feature_loss(IMAGE, TEACHER.image).item() == _about(2.5 * 0.4)


def test_a_bank_adds_columns_to_the_affinity() -> None:
    # Rows of the student: 2 [.6, 0, .8] and 2 [.8, 1, .6]; of the teacher: 2 [1, 0, .8] and
    # 2 [.8, .6, 1]. Each counts as much as the teacher gives to its own column.
    teacher = [_softmax(2, 0, 1.6), _softmax(1.6, 1.2, 2)]
    student = [_softmax(1.2, 0, 1.6), _softmax(1.6, 2, 1.2)]
    rows = [own[n] * _kl(own, student[n]) for n, own in enumerate(teacher)]
    more = BANK.cosines(IMAGE, [TEACHER])
    wanted = (sum(rows) + sum(COLUMNS)) / 4
    assert affinity_loss(IMAGE, TEXT, [TEACHER], bank=more).item() == _about(wanted)
    # Where the third text is the second picture's caption too, it is known together with its own.
    second = (teacher[1][1] + teacher[1][2]) * _kl(teacher[1], student[1])
    wanted = (rows[0] + second + sum(COLUMNS)) / 4
    more = OWN.cosines(IMAGE, [TEACHER])
    assert affinity_loss(IMAGE, TEXT, [TEACHER], bank=more).item() == _about(wanted)


def test_a_bank_adds_columns_to_the_interactive_loss() -> None:
    # Pictures against the teacher's texts: 2 [1, 0, .8] and 2 [0, 1, .6].
    teacher = [_softmax(2, 0, 1.6), _softmax(1.6, 1.2, 2)]
    images = teacher[1][1] * _kl(teacher[1], _softmax(0, 2, 1.2)) / 2  # the first ones are equal
    texts = _sigmoid(0.4) * _kl(_softmax(2, 1.6), _softmax(1.2, 1.92)) / 2  # see `test_losses.py`
    more = BANK.cosines(IMAGE, [TEACHER])
    assert interactive_loss(IMAGE, TEXT, [TEACHER], bank=more).item() == _about(
        (images + texts) / 2
    )


def test_a_bank_adds_wrong_texts_to_contrast_but_no_equal_ones() -> None:
    columns = -math.log(_softmax(1.2, 1.6)[0]) - math.log(_softmax(0, 2)[1])
    rows = [-math.log(_softmax(1.2, 0, 1.6)[0]), -math.log(_softmax(1.6, 2, 1.2)[1])]
    more = BANK.cosines(IMAGE, [TEACHER])
    assert contrastive_loss(IMAGE, TEXT, 2.0, bank=more).item() == _about((sum(rows) + columns) / 4)
    rows[1] = -math.log(_softmax(1.6, 2)[1])
    more = OWN.cosines(IMAGE, [TEACHER])
    assert contrastive_loss(IMAGE, TEXT, 2.0, bank=more).item() == _about((sum(rows) + columns) / 4)


def test_rows_that_count_the_same_or_by_what_the_student_misses() -> None:
    rows = [_kl(_softmax(2, 0), _softmax(1.2, 0)), _kl(_softmax(1.6, 1.2), _softmax(1.6, 2))]
    columns = [own / known for own, known in zip(COLUMNS, map(_sigmoid, (0.4, 1.2)), strict=True)]
    equal = affinity_loss(IMAGE, TEXT, [TEACHER], rows=RowWeights(by="equal")).item()
    assert equal == _about((sum(rows) + sum(columns)) / 4)
    # The student gives the right ones sigmoid(1.2), (.4), and of the columns (-.4) and (2).
    missed = [(1 - _sigmoid(own)) ** 2 for own in (1.2, 0.4, -0.4, 2)]
    wanted = sum(a * b for a, b in zip(missed, rows + columns, strict=True)) / 4
    how = RowWeights(by="equal", focus=2)
    assert affinity_loss(IMAGE, TEXT, [TEACHER], rows=how).item() == _about(wanted)


def test_hard_negatives() -> None:
    # The teacher's cosines: [1, 0, .8] and [.8, .6, 1]. The first picture's negatives are .8 (the
    # third text) and 0. Both others of the second are nearer than its own, so none counts.
    more = BANK.cosines(IMAGE, [TEACHER])
    # One negative: its weight is 1. The student's logits are 1.2, and 1.6 for the third text.
    one = -math.log(_softmax(1.2, 1.6)[0]) / 2
    assert hard_negative_loss(IMAGE, TEXT, TEACHER, bank=more, count=1).item() == _about(one)
    # Two: weighted by e^1.6 and e^0, that sum to 2.
    hard, easy = (2 * own for own in _softmax(1.6, 0))
    whole = math.exp(1.2) + hard * math.exp(1.6) + easy * math.exp(0)
    two = -math.log(math.exp(1.2) / whole) / 2
    for count in (2, 8):
        found = hard_negative_loss(IMAGE, TEXT, TEACHER, bank=more, count=count)
        assert found.item() == _about(two)
    # The third text is the first one's own caption: only the easy one is left.
    own = Bank(texts=BANK.texts, same=tensor([[True], [False]])).cosines(IMAGE, [TEACHER])
    easy_alone = -math.log(_softmax(1.2, 0)[0]) / 2
    assert hard_negative_loss(IMAGE, TEXT, TEACHER, bank=own).item() == _about(easy_alone)
    assert hard_negative_loss(IMAGE, TEXT, TEACHER).item() == _about(easy_alone)


def test_pictures_without_a_negative_give_no_gradient() -> None:
    image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
    same = torch.ones(2, 2, dtype=torch.bool)
    loss = hard_negative_loss(image, text, TEACHER, same)
    loss.backward()
    assert loss.item() == 0
    for rows in (image, text):
        assert rows.grad is not None
        assert rows.grad.abs().max() == 0


def test_sigmoid() -> None:
    # 2 cos - 1: [.2, -1] and [.6, 1]; the own ones are right, the others wrong.
    inside = sum(math.log(1 + math.exp(own)) for own in (-0.2, -1, 0.6, -1)) / 2
    assert sigmoid_loss(IMAGE, TEXT, 2.0, -1.0).item() == _about(inside)
    # The third text: .6 and .2, both wrong; or the second one right.
    wrong = sum(math.log(1 + math.exp(own)) for own in (0.6, 0.2)) / 2
    more = BANK.cosines(IMAGE, [SIGLIP])
    assert sigmoid_loss(IMAGE, TEXT, 2.0, -1.0, bank=more).item() == _about(inside + wrong)
    right = sum(math.log(1 + math.exp(own)) for own in (0.6, -0.2)) / 2
    more = OWN.cosines(IMAGE, [SIGLIP])
    assert sigmoid_loss(IMAGE, TEXT, 2.0, -1.0, bank=more).item() == _about(inside + right)
    every = torch.ones(2, 2, dtype=torch.bool)
    all_right = sum(math.log(1 + math.exp(own)) for own in (-0.2, 1, -0.6, -1)) / 2
    assert sigmoid_loss(IMAGE, TEXT, 2.0, -1.0, every).item() == _about(all_right)


def test_logits_at_a_temperature() -> None:
    # At temperature 2 the logits are the cosines; the loss is multiplied by 4.
    rows = _kl(_softmax(1, 0), _softmax(0.6, 0)) + _kl(_softmax(0.8, 0.6), _softmax(0.8, 1))
    columns = _kl(_softmax(1, 0.8), _softmax(0.6, 0.8)) + _kl(_softmax(0, 0.6), _softmax(0, 1))
    found = logit_loss(IMAGE, TEXT, [TEACHER], temperature=2).item()
    assert found == _about(4 * (rows + columns) / 4)
    rows = _kl(_softmax(1, 0, 0.8), _softmax(0.6, 0, 0.8))
    rows += _kl(_softmax(0.8, 0.6, 1), _softmax(0.8, 1, 0.6))
    more = BANK.cosines(IMAGE, [TEACHER])
    found = logit_loss(IMAGE, TEXT, [TEACHER], temperature=2, bank=more).item()
    assert found == _about(4 * (rows + columns) / 4)


def test_logits_of_a_siglip() -> None:
    # (2 cos - 1) / 2 = cos - 1/2. The teacher's: [.5, -.5], [.3, .1]; the student's: [.1, -.5],
    # [.3, .5].
    each = [(0.5, 0.1), (-0.5, -0.5), (0.3, 0.3), (0.1, 0.5)]
    both = [([_sigmoid(a), _sigmoid(-a)], [_sigmoid(b), _sigmoid(-b)]) for a, b in each]
    wanted = 4 * sum(_kl(*own) for own in both) / 2
    assert logit_loss(IMAGE, TEXT, [SIGLIP], temperature=2).item() == _about(wanted)
    # The third text: .8 - .5 and 1 - .5 of the teacher, .8 - .5 and .6 - .5 of the student.
    wanted += 4 * _kl([_sigmoid(0.5), _sigmoid(-0.5)], [_sigmoid(0.1), _sigmoid(-0.1)]) / 2
    more = BANK.cosines(IMAGE, [SIGLIP])
    found = logit_loss(IMAGE, TEXT, [SIGLIP], temperature=2, bank=more).item()
    assert found == _about(wanted)


def test_relational() -> None:
    # Cosines among three rows: the teacher's 0, .6 and .8; the student's 0, .8 and .6.
    three = tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    ours = tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    rows = [_kl(_softmax(0, 1.2), _softmax(0, 1.6)), _kl(_softmax(0, 1.6), _softmax(0, 1.2))]
    rows += [_kl(_softmax(1.2, 1.6), _softmax(1.6, 1.2))]
    assert relational_loss(ours, [three], [2.0]).item() == _about(sum(rows) / 3)
    assert relational_loss(three[:1], [three[:1]], [2.0]).item() == 0


def test_vertical() -> None:
    # The student's pictures against the teacher's: [[1, .8], [0, .6]]; the teacher's: [[1, .8],
    # [.8, 1]]. The first rows are equal.
    wanted = _kl(_softmax(1.6, 2), _softmax(0, 1.2)) / 2
    assert vertical_loss(IMAGE, TEACHER.image, 2.0).item() == _about(wanted)
    # Another row of the teacher at (0, 1): 0 and .6 for the teacher, 0 and 1 for the student.
    more = tensor([[0.0, 1.0]])
    wanted = _kl(_softmax(1.6, 2, 1.2), _softmax(0, 1.2, 2)) / 2
    assert vertical_loss(IMAGE, TEACHER.image, 2.0, more).item() == _about(wanted)


def test_orthogonality() -> None:
    # Of two rows, the covariance of two dimensions is half the product of their differences:
    # 1 x -1 / 2 = -.5 for the student, .2 x -.6 / 2 = -.06 for the teacher. It counts twice, over
    # two dimensions.
    assert orthogonality_loss(IMAGE, TEACHER.image).item() == _about(0.44**2)
    assert orthogonality_loss(IMAGE[:1], IMAGE[:1]).item() == 0


def test_patches() -> None:
    # Cosines 1, 0, .6 and .8, of whatever length.
    ours = torch.stack([IMAGE, 3 * IMAGE])
    theirs = tensor([[[2.0, 0.0], [1.0, 0.0]], [[0.6, 0.8], [0.6, 0.8]]])
    assert patch_loss(ours, theirs).item() == _about(1 - (1 + 0 + 0.6 + 0.8) / 4)


def _random(seed: int, count: int = 6, dim: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(normalize(torch.randn(count, dim, generator=generator)) for _ in range(5))


def _bank(texts: Tensor, count: int = 6) -> Bank:
    same = torch.zeros(count, len(texts), dtype=torch.bool)
    same[0, 1] = True
    return Bank(texts=[texts], same=same)


ONES: dict[str, Any] = dict.fromkeys(TERMS, 1.0)
ALL = LossWeights(**ONES, row_focus=1.0)


NOT_SOFT = {"contrastive", "hard_negatives", "sigmoid"}
NOT_SOFT |= {"masked", "patches"}  # which are not of the embeddings of whole pictures


@pytest.mark.parametrize("name", sorted(set(TERMS) - NOT_SOFT))
@pytest.mark.parametrize("bias", [None, -3.0])
def test_nothing_pulls_a_student_that_equals_its_teacher(name: str, bias: float | None) -> None:
    image, text, *_, more = _random(1)
    teacher = TeacherRows(image=image.clone(), text=text.clone(), scale=20.0, bias=bias)
    one: dict[str, Any] = {**dict.fromkeys(ONES, 0.0), name: 1.0}
    weights = LossWeights(**one, row_focus=1.0)
    ours = (image.requires_grad_(), text.requires_grad_())
    found = distillation_losses(
        weights, image=ours[0], text=ours[1], teachers=[teacher], bank=_bank(more)
    )
    assert found["total"].item() == pytest.approx(0, abs=1e-5)
    found["total"].backward()
    for rows in ours:
        assert rows.grad is not None
        along = rows.grad - (rows.grad * rows).sum(dim=1, keepdim=True) * rows
        assert along.abs().max() < 1e-4  # what only makes a row longer is normalised off


@given(seed=st.integers(0, 2**16), bias=st.sampled_from([None, -3.0]))
def test_order_and_rotation_change_no_loss(seed: int, bias: float | None) -> None:
    image, text, *rows, more = _random(seed)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0]
    order, other = (torch.randperm(6, generator=generator) for _ in range(2))

    def losses(own: list[Tensor], bank: Bank) -> dict[str, Tensor]:
        teacher = TeacherRows(image=own[2], text=own[3], scale=10.0, bias=bias)
        return distillation_losses(ALL, image=own[0], text=own[1], teachers=[teacher], bank=bank)

    whole = [image, text, *rows]
    plain = losses(whole, _bank(more))
    same = _bank(more).same
    shuffled = losses(
        [own[order] for own in whole],
        Bank(texts=[more[other]], same=same[order][:, other]),
    )
    turned = losses([own @ turn for own in whole], Bank(texts=[more @ turn], same=same))
    for name, value in plain.items():
        assert shuffled[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        if name not in ("orthogonality", "total"):  # the one that knows dimensions
            assert turned[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    # The relation among a tower's own rows needs no common space at all.
    both = [relational_loss(own, [rows[0]], [10.0]).item() for own in (image, image @ turn)]
    assert both[0] == pytest.approx(both[1], rel=1e-4, abs=1e-5)


def test_a_factor_on_the_logit_scale_of_each_teacher() -> None:
    image, text, *rows, _ = _random(3)
    one, two = (
        TeacherRows(image=own, text=rows[1], scale=s)
        for own, s in zip(rows[:2], (5.0, 8.0), strict=True)
    )
    weights = LossWeights(feature=0, interactive=0, affinity_scale=(2.0, 0.5))
    scaled = [
        TeacherRows(image=own.image, text=own.text, scale=s)
        for own, s in zip((one, two), (10.0, 4.0), strict=True)
    ]
    found = distillation_losses(weights, image=image, text=text, teachers=[one, two])
    assert found["affinity"].item() == pytest.approx(affinity_loss(image, text, scaled).item())


def test_what_teachers_cannot_teach() -> None:
    with pytest.raises(ConfigError, match="3 factors for 2 teachers"):
        LossWeights(affinity_scale=(1.0, 2.0, 3.0)).check([None, None])
    with pytest.raises(ConfigError, match="one factor above 0"):
        LossWeights(affinity_scale=(0.0,))
    with pytest.raises(ConfigError, match="needs a teacher with a logit bias"):
        LossWeights(sigmoid=1.0).check([None])
    with pytest.raises(ConfigError, match="teachers of one kind"):
        LossWeights(logits=1.0).check([None, -10.0])
    with pytest.raises(ConfigError, match="do not go together"):
        LossWeights(selection="learnable", bank=4).check([None])
    LossWeights(sigmoid=1.0, logits=1.0, affinity_scale=(1.0, 2.0)).check([-10.0, -12.0])
