import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.compress.diagnose.similarity import (
    alignment,
    gaussian_information,
    jackknifed,
    ledoit_wolf,
    linear_cka,
    modality_gap,
    neighbour_agreement,
    uniformity,
)
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError


def rows(count: int, width: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).normal(size=(count, width))


def unit(values: Values) -> Values:
    found: Values = values / np.linalg.norm(values, axis=1, keepdims=True)
    return found


@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_cka_knows_no_rotation_and_no_scale(seed: int, scale: float) -> None:
    states = rows(40, 6, seed)
    rotation, _ = np.linalg.qr(rows(6, 6, seed + 1))
    found = linear_cka([states], [scale * states @ rotation + 3])
    assert found.values[0, 0] == pytest.approx(1)


def test_cka_of_unrelated_states_is_nothing_even_where_they_are_wide() -> None:
    first, second = rows(100, 400, 1), rows(100, 400, 2)
    value = linear_cka([first], [second]).best(0)[1].interval
    assert value.low < 0 < value.high
    assert abs(value.value) < 0.05  # the biased estimate says 0.8


def test_cka_is_the_ratio_of_unbiased_hsic() -> None:
    # By the formula of Song et al., not by U-centring.
    first, second = rows(40, 3, 1), rows(40, 3, 2) + rows(40, 3, 1)

    def hsic(one: Values, other: Values) -> float:
        k, m = one @ one.T, other @ other.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        n = len(k)
        ends = k.sum() * m.sum() / (n - 1) / (n - 2) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
        return float((np.trace(k @ m) + ends) / n / (n - 3))

    wanted = hsic(first, second) / math.sqrt(hsic(first, first) * hsic(second, second))
    assert linear_cka([first], [second]).values[0, 0] == pytest.approx(wanted)


def test_neighbours_are_counted_above_chance() -> None:
    # Four points on a line in two orders; the nearest of each is the same for the first two only.
    first = unit(np.array([[1, 0.0], [1, 0.1], [1, 1.0], [1, 1.2]]))
    second = unit(np.array([[1, 0.0], [1, 0.1], [1, 0.3], [1, 9.0]]))
    found = neighbour_agreement(first, second, neighbours=1)
    chance = 1 / 3
    assert found == pytest.approx([1, 1, -chance / (1 - chance), 1])
    same = unit(rows(50, 4))
    assert (neighbour_agreement(same, same, neighbours=5) == 1).all()
    unrelated = neighbour_agreement(unit(rows(400, 8, 1)), unit(rows(400, 8, 2)), neighbours=10)
    assert abs(unrelated.mean()) < 0.02


def test_geometry_by_hand() -> None:
    image, text = np.array([[1.0, 0], [0, 1]]), np.array([[0.0, 1], [0, 1]])
    assert modality_gap(image, text) == pytest.approx(math.sqrt(0.5))
    assert alignment(image, text) == pytest.approx([2, 0])
    assert uniformity(image) == pytest.approx(-4)  # one pair at a squared distance of 2
    assert uniformity(text) == 0  # collapsed


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = rows(400, 1)[:, 0]
    found = jackknifed(lambda part: float(values[part].mean()), 400, seed=0)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std() / 20, rel=0.5)
    with pytest.raises(InputError):
        jackknifed(lambda part: 0.0, 10, seed=0)


def test_gaussian_information_of_correlated_numbers() -> None:
    noise = rows(4000, 2)
    first = noise[:, :1]
    second = 0.8 * noise[:, :1] + 0.6 * noise[:, 1:]
    found = gaussian_information(first, second)
    assert found.bits == pytest.approx(-math.log2(1 - 0.8**2) / 2, abs=0.05)
    assert found.dims == 1
    nothing = gaussian_information(rows(200, 8, 1), rows(200, 8, 2))
    assert nothing.bits == pytest.approx(nothing.null, abs=0.1)


def test_shrinkage_fades_with_the_number_of_items() -> None:
    spread = np.array([1.0, 2, 3, 4])
    few, many = (ledoit_wolf(rows(n, 4) * spread) for n in (8, 4000))
    assert 0 < many[1] < few[1] <= 1
    assert np.diag(many[0]) == pytest.approx(spread**2, rel=0.1)
