"""The numbers on the right are worked by hand, in the comments, not by another program."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.nn.functional import cross_entropy, normalize

from edgeclip.compress.train.loss_terms import (
    TeacherRows,
    affinity_loss,
    contrastive_loss,
    equal_captions,
    feature_loss,
    interactive_loss,
)
from edgeclip.compress.train.losses import LossWeights, distillation_losses
from edgeclip.runtime.errors import ConfigError

# Two pairs in two dimensions; 0.6 and 0.8 have length 1.
IMAGE = tensor([[1.0, 0.0], [0.0, 1.0]])
TEXT = tensor([[0.6, 0.8], [0.0, 1.0]])
TEACHER_IMAGE = tensor([[1.0, 0.0], [0.8, 0.6]])
TEACHER_TEXT = tensor([[1.0, 0.0], [0.0, 1.0]])


def _teacher(image: Tensor, text: Tensor, scale: float) -> TeacherRows:
    return TeacherRows(image=image, text=text, scale=scale)


TEACHERS = [_teacher(TEACHER_IMAGE, TEACHER_TEXT, 2.0)]


def _log1pexp(x: float) -> float:
    """Minus the log probability of the lesser of two logits that are x apart."""
    return math.log(1 + math.exp(x))


def _kl(p: float, q: float) -> float:
    """KL divergence of (p, 1 - p) from (q, 1 - q)."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_contrastive() -> None:
    # image @ text.T = [[.6, 0], [.8, 1]]; twice that is [[1.2, 0], [1.6, 2]].
    # Rows, right minus wrong: 1.2 and 0.4. Columns: 1.2 - 1.6 = -0.4 and 2 - 0 = 2.
    rows = (_log1pexp(-1.2) + _log1pexp(-0.4)) / 2
    columns = (_log1pexp(0.4) + _log1pexp(-2.0)) / 2
    assert contrastive_loss(IMAGE, TEXT, 2.0).item() == pytest.approx(
        (rows + columns) / 2, abs=1e-6
    )
    assert contrastive_loss(IMAGE, TEXT, tensor(2.0)).item() == pytest.approx(0.4541, abs=1e-4)


def test_pairs_of_one_caption_are_no_rivals() -> None:
    # Pictures 0 and 1 have one caption, whose half each is then right: -(log p + log q) / 2.
    image, text = IMAGE[[0, 1]], TEXT[[0, 0]]
    same = equal_captions(tensor([7, 7]))
    assert same.all()
    # Both captions are equally near to each picture; pictures to captions: 1.2 and 1.6.
    rows = math.log(2)
    columns = (_log1pexp(0.4) + _log1pexp(-0.4)) / 2
    value = contrastive_loss(image, text, 2.0, same).item()
    assert value == pytest.approx((rows + columns) / 2, abs=1e-6)
    wanted = [[True, False, True], [False, True, False], [True, False, True]]
    assert equal_captions(tensor([5, -3, 5])).tolist() == wanted


def test_contrastive_of_one_pair_is_zero() -> None:
    assert contrastive_loss(IMAGE[:1], TEXT[:1], 3.0).item() == 0


def test_feature() -> None:
    # Cosines of images: 1 and 0.6, so 5 (0 + 0.4) / 2. Of texts: 0.6 and 1, the same.
    assert feature_loss(IMAGE, TEACHER_IMAGE).item() == pytest.approx(1.0, abs=1e-6)
    assert feature_loss(TEXT, TEACHER_TEXT).item() == pytest.approx(1.0, abs=1e-6)
    assert feature_loss(-IMAGE, IMAGE).item() == pytest.approx(10.0)
    assert feature_loss(IMAGE, IMAGE).item() == 0


def test_affinity() -> None:
    # Student logits at scale 2: [[1.2, 0], [1.6, 2]]; teacher's: 2 [[1, 0], [.8, .6]].
    # Rows: the first of two has probability sigmoid(difference). Before each KL stands what the
    # teacher gives to the right one.
    rows = _sigmoid(2.0) * _kl(_sigmoid(2.0), _sigmoid(1.2))
    rows += _sigmoid(-0.4) * _kl(_sigmoid(0.4), _sigmoid(-0.4))
    # Columns of the teacher: 2 - 1.6 and 0 - 1.2; of the student: 1.2 - 1.6 and 0 - 2.
    columns = _sigmoid(0.4) * _kl(_sigmoid(0.4), _sigmoid(-0.4))
    columns += _sigmoid(1.2) * _kl(_sigmoid(-1.2), _sigmoid(-2.0))
    value = affinity_loss(IMAGE, TEXT, TEACHERS).item()
    assert value == pytest.approx((rows / 2 + columns / 2) / 2, abs=1e-6)


def test_equal_captions_are_known_together() -> None:
    # With all captions equal, whatever the teacher takes is right: every row counts in full.
    rows = _kl(_sigmoid(2.0), _sigmoid(1.2)) + _kl(_sigmoid(0.4), _sigmoid(-0.4))
    columns = _kl(_sigmoid(0.4), _sigmoid(-0.4)) + _kl(_sigmoid(-1.2), _sigmoid(-2.0))
    same = torch.ones(2, 2, dtype=torch.bool)
    value = affinity_loss(IMAGE, TEXT, TEACHERS, same).item()
    assert value == pytest.approx((rows / 2 + columns / 2) / 2, abs=1e-6)


def test_affinity_of_equals_is_zero() -> None:
    assert affinity_loss(IMAGE, TEXT, [_teacher(IMAGE, TEXT, 50.0)]).item() == pytest.approx(
        0, abs=1e-6
    )


def test_interactive() -> None:
    # Image against teacher's text: 2 [[1, 0], [0, 1]]; the teacher's images: 2 [[1, 0], [.8, .6]].
    # The first rows are equal; the second takes the first text with sigmoid(-2), not (0.4).
    images = _sigmoid(-0.4) * _kl(_sigmoid(0.4), _sigmoid(-2.0)) / 2
    # Text against teacher's image: 2 [[.6, .96], [0, .6]]; the teacher's: 2 [[1, .8], [0, .6]].
    texts = _sigmoid(0.4) * _kl(_sigmoid(0.4), _sigmoid(-0.72)) / 2
    value = interactive_loss(IMAGE, TEXT, TEACHERS).item()
    assert value == pytest.approx((images + texts) / 2, abs=1e-6)


def test_interactive_of_equals_is_zero() -> None:
    rows = (TEACHER_IMAGE, TEACHER_TEXT)
    assert interactive_loss(*rows, [_teacher(*rows, 50.0)]).item() == pytest.approx(0, abs=1e-6)


def test_several_teachers_are_averaged_after_the_softmax() -> None:
    # A second teacher, at scale 1, with the texts the other way round: its logits are
    # [[0, 1], [.6, .8]].
    teachers = [*TEACHERS, _teacher(TEACHER_IMAGE, TEACHER_TEXT.flip(0), 1.0)]
    rows = [(_sigmoid(2.0) + _sigmoid(-1.0)) / 2, (_sigmoid(0.4) + _sigmoid(-0.2)) / 2]
    columns = [(_sigmoid(0.4) + _sigmoid(-0.6)) / 2, (_sigmoid(-1.2) + _sigmoid(0.2)) / 2]
    # The student answers at the first one's scale, as in `test_affinity`.
    loss = rows[0] * _kl(rows[0], _sigmoid(1.2)) + (1 - rows[1]) * _kl(rows[1], _sigmoid(-0.4))
    loss += columns[0] * _kl(columns[0], _sigmoid(-0.4))
    loss += (1 - columns[1]) * _kl(columns[1], _sigmoid(-2.0))
    assert affinity_loss(IMAGE, TEXT, teachers).item() == pytest.approx(loss / 4, abs=1e-6)
    # Image against the first teacher's texts: 2 [[1, 0], [0, 1]]; text against its images.
    loss = rows[0] * _kl(rows[0], _sigmoid(2.0)) + (1 - rows[1]) * _kl(rows[1], _sigmoid(-2.0))
    loss += columns[0] * _kl(columns[0], _sigmoid(-0.72))
    loss += (1 - columns[1]) * _kl(columns[1], _sigmoid(-1.2))
    assert interactive_loss(IMAGE, TEXT, teachers).item() == pytest.approx(loss / 4, abs=1e-6)


def test_a_teacher_beside_itself_changes_nothing() -> None:
    image, text, *rows = _random(9)
    one = [_teacher(rows[0], rows[1], 7.0)]
    for loss in (affinity_loss, interactive_loss):
        assert loss(image, text, one * 2).item() == pytest.approx(loss(image, text, one).item())


def test_pictures_without_captions_learn_by_their_features_alone() -> None:
    image, text, *rows = _random(10)
    captioned = tensor([True, False, True, True, False, True])
    same = equal_captions(tensor([1, 1, 1, 2, 3, 4]))
    found = distillation_losses(
        EVERY,
        image=image,
        text=text,
        teachers=[_teacher(rows[0], rows[1], 10.0)],
        captioned=captioned,
        same=same,
    )
    ours, theirs = ((own[0][captioned], own[1][captioned]) for own in ((image, text), rows))
    among = same[captioned][:, captioned]
    both = [_teacher(*theirs, 10.0)]
    feature = (feature_loss(image, rows[0]) + feature_loss(ours[1], theirs[1])) / 2
    wanted = {
        "feature": feature,
        "affinity": affinity_loss(*ours, both, among),
        "interactive": interactive_loss(*ours, both, among),
        "contrastive": contrastive_loss(*ours, 10.0, among),
    }
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value.item()), name
    none = torch.zeros(6, dtype=torch.bool)
    alone = distillation_losses(
        EVERY, image=image, text=text, teachers=[_teacher(rows[0], rows[1], 10.0)], captioned=none
    )
    assert set(alone) == {"total", "feature"}
    # A picture pulls as much as it does in a batch where others have captions.
    images = feature_loss(image, rows[0]).item() / 2
    assert alone["total"].item() == pytest.approx(EVERY.feature * images)


def _random(seed: int, count: int = 6, dim: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(normalize(torch.randn(count, dim, generator=generator)) for _ in range(4))


def _all(rows: tuple[Tensor, ...], weights: LossWeights) -> dict[str, Tensor]:
    image, text, teacher_image, teacher_text = rows
    return distillation_losses(
        weights,
        image=image,
        text=text,
        teachers=[_teacher(teacher_image, teacher_text, 10.0)],
    )


def _alone(name: str) -> LossWeights:
    given: dict[str, Any] = dict.fromkeys(("affinity", "feature", "interactive"), 0.0)
    return LossWeights(**{**given, name: 1.0})


EVERY = LossWeights(affinity=0.5, feature=2.0, interactive=3.0, contrastive=0.25)


def test_the_order_of_a_batch_does_not_matter() -> None:
    rows = _random(0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = _all(tuple(row[order] for row in rows), EVERY)
    for name, value in _all(rows, EVERY).items():
        assert shuffled[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_the_pairing_matters() -> None:
    image, text, teacher_image, teacher_text = _random(1)
    mixed = _all((image, text.flip(0), teacher_image, teacher_text), EVERY)
    for name, value in _all((image, text, teacher_image, teacher_text), EVERY).items():
        assert mixed[name].item() != pytest.approx(value.item(), rel=1e-3), name


def test_total_is_the_weighted_sum_of_what_counts() -> None:
    parts = _all(_random(2), EVERY)
    assert list(parts) == ["total", "feature", "affinity", "interactive", "contrastive"]
    by_hand = (
        0.5 * parts["affinity"]
        + 2 * parts["feature"]
        + 3 * parts["interactive"]
        + 0.25 * parts["contrastive"]
    )
    assert parts["total"].item() == pytest.approx(by_hand.item(), rel=1e-6)
    only = _all(_random(2), LossWeights(affinity=0, feature=0, interactive=0, contrastive=2))
    assert set(only) == {"total", "contrastive"}
    assert only["total"].item() == pytest.approx(2 * only["contrastive"].item())


@pytest.mark.parametrize("name", ["affinity", "feature", "interactive", "contrastive"])
def test_gradients_reach_both_towers_of_the_student(name: str) -> None:
    image, text, teacher_image, teacher_text = _random(3)
    image.requires_grad_()
    text.requires_grad_()
    weights = _alone(name)
    _all((image, text, teacher_image, teacher_text), weights)["total"].backward()
    for tower in (image, text):
        assert tower.grad is not None
        assert tower.grad.abs().sum() > 1e-3
    assert teacher_image.grad is None
    assert teacher_text.grad is None


def test_affinity_gives_the_teacher_no_gradient() -> None:
    rows = [row.requires_grad_() for row in _random(4)]
    affinity_loss(rows[0], rows[1], [_teacher(rows[2], rows[3], 10.0)]).backward()
    assert [row.grad is not None for row in rows] == [True, True, False, False]


def test_learning_by_each_loss_finds_the_teacher() -> None:
    _, _, teacher_image, teacher_text = _random(5)
    for name in ("affinity", "feature", "interactive"):
        generator = torch.Generator().manual_seed(6)
        free = [torch.randn(6, 5, generator=generator, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.Adam(free, lr=0.05)
        weights = _alone(name)
        values = []
        for _ in range(60):
            rows = (normalize(free[0]), normalize(free[1]), teacher_image, teacher_text)
            total = _all(rows, weights)["total"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            values.append(total.item())
        assert values[-1] < 0.5 * values[0], name


def _strangers(count: int = 64, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Embeddings by a teacher that knows nothing: which text is nearest to an image is chance."""
    generator = torch.Generator().manual_seed(7)
    image, text = (normalize(torch.randn(count, dim, generator=generator)) for _ in range(2))
    return image, text


def _hard_interactive(image: Tensor, text: Tensor, teachers: tuple[Tensor, Tensor]) -> Tensor:
    """CLIP-KD's own loss: the targets are one-hot, whatever the teacher knows."""
    target = torch.arange(len(image))
    logits = 100 * image @ teachers[1].T, 100 * text @ teachers[0].T
    return (cross_entropy(logits[0], target) + cross_entropy(logits[1], target)) / 2


def _along_the_sphere(rows: Tensor) -> float:
    """The largest gradient of a row that turns it; what only makes it longer is normalised off."""
    assert rows.grad is not None
    unit = rows.detach()
    turning = rows.grad - (rows.grad * unit).sum(dim=1, keepdim=True) * unit
    largest: float = turning.norm(dim=1).max().item()
    return largest * len(rows)


def _default_total(image: Tensor, text: Tensor, teachers: tuple[Tensor, Tensor]) -> Tensor:
    found = distillation_losses(
        LossWeights(),
        image=image,
        text=text,
        teachers=[_teacher(*teachers, 100.0)],
    )
    return found["total"]


def test_nothing_pulls_a_student_that_equals_its_teacher() -> None:
    teachers = _strangers()
    image, text = (rows.clone().requires_grad_() for rows in teachers)
    _default_total(image, text, teachers).backward()
    assert max(map(_along_the_sphere, (image, text))) < 1e-2
    image, text = (rows.clone().requires_grad_() for rows in teachers)
    _hard_interactive(image, text, teachers).backward()
    assert min(map(_along_the_sphere, (image, text))) > 10


def test_by_default_a_teacher_that_knows_nothing_is_found_too() -> None:
    teachers = _strangers()

    def reached(hard: float) -> float:
        generator = torch.Generator().manual_seed(8)
        free = [torch.randn(64, 32, generator=generator, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.Adam(free, lr=0.02)
        for _ in range(300):
            image, text = normalize(free[0]), normalize(free[1])
            total = _default_total(image, text, teachers)
            total = total + hard * _hard_interactive(image, text, teachers)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return (normalize(free[0]) * teachers[0]).sum(dim=1).mean().item()

    assert reached(hard=0.0) > 0.99
    assert reached(hard=10.0) < 0.9


def test_default_weights_leave_plain_contrast_out() -> None:
    assert LossWeights() == LossWeights(affinity=1, feature=10, interactive=1, contrastive=0)


def test_impossible_weights() -> None:
    with pytest.raises(ConfigError, match=r"affinity must be at least 0, got -1.*; feature must"):
        LossWeights(affinity=-1.0, feature=math.nan)
    with pytest.raises(ConfigError, match="the weights of all losses are 0"):
        LossWeights(affinity=0, feature=0, interactive=0)
