import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.compress.data.sampling import MOST_HELD_OUT, Part, Sampling
from edgeclip.runtime.errors import ConfigError

BILLION = 10**9


def _epochs(sampling: Sampling, count: int, epochs: int) -> NDArray[np.int64]:
    return sampling.items(0, count * epochs)[0].reshape(epochs, count)


@given(
    count=st.integers(1, 300),
    seed=st.integers(0, 2**70),
    share=st.floats(0, 0.99),
    epoch=st.integers(0, 10**6),
)
def test_every_item_once_an_epoch(count: int, seed: int, share: float, epoch: int) -> None:
    sampling = Sampling([Part(count)], seed=seed, held_out=int(share * count))
    index, epochs = sampling.items(epoch * sampling.train_count, sampling.train_count)
    assert index.dtype == epochs.dtype == sampling.held_out.dtype == np.int64
    assert set(epochs.tolist()) == {epoch}
    everything = np.concatenate([index, sampling.held_out])
    assert sorted(everything.tolist()) == list(range(count))
    assert (np.diff(sampling.held_out) > 0).all()


@given(
    parts=st.lists(st.tuples(st.integers(1, 50), st.floats(1e-3, 1e3)), min_size=1, max_size=5),
    weighted=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    seed=st.integers(0, 9),
)
def test_position_alone_decides(
    parts: list[tuple[int, float]], weighted: bool, cuts: list[int], seed: int
) -> None:
    """However the positions are cut into steps and given to workers, the items are the same."""
    given_parts = [Part(count, weight if weighted else None) for count, weight in parts]
    whole = Sampling(given_parts, seed=seed, held_out=0).items(0, 400)
    bounds = [0, *sorted(cuts), 400]
    pieces = [
        Sampling(given_parts, seed=seed, held_out=0).items(first, last - first)
        for first, last in itertools.pairwise(bounds)
    ]
    for number in (0, 1):
        np.testing.assert_array_equal(np.concatenate([p[number] for p in pieces]), whole[number])


@given(
    parts=st.lists(st.tuples(st.integers(2, 60), st.floats(0.01, 100)), min_size=1, max_size=6),
    held_out=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_parts_are_mixed_by_weight(
    parts: list[tuple[int, float]], held_out: int, seed: int
) -> None:
    held_out = min(held_out, sum(count - 1 for count, _ in parts))
    sampling = Sampling([Part(*part) for part in parts], seed=seed, held_out=held_out)
    first = np.cumsum([0, *(count for count, _ in parts)])
    index, epoch = sampling.items(0, 2000)
    part = np.searchsorted(first, index, side="right") - 1
    total = sum(weight for _, weight in parts)
    for number, (_, weight) in enumerate(parts):
        seen = np.cumsum(part == number)
        due = np.arange(1, 2001) * weight / total
        assert np.abs(seen - due).max() <= len(parts) + 1e-3
        # Within the part: every item once before any comes again.
        own = index[part == number]
        train = sorted(set(range(first[number], first[number + 1])) - set(sampling.held_out))
        np.testing.assert_array_equal(epoch[part == number], np.arange(len(own)) // len(train))
        for start in range(0, len(own) - len(train) + 1, len(train)):
            assert sorted(own[start : start + len(train)].tolist()) == train


def test_without_weights_every_item_once() -> None:
    sampling = Sampling([Part(1000), Part(37), Part(1)], seed=4)
    index, epoch = sampling.items(0, 2 * sampling.train_count)
    assert set(Counter(index.tolist()).values()) == {2}
    assert len(set(index.tolist())) == sampling.train_count
    np.testing.assert_array_equal(np.bincount(epoch), [sampling.train_count] * 2)


def test_what_is_held_out() -> None:
    assert len(Sampling([Part(1000)], seed=0).held_out) == 100
    assert len(Sampling([Part(10**6)], seed=0).held_out) == MOST_HELD_OUT
    assert len(Sampling([Part(3)], seed=0).held_out) == 0
    assert len(Sampling([Part(BILLION)], seed=0, held_out=5000).held_out) == 5000
    one, other = (Sampling([Part(500)], seed=seed).held_out for seed in (1, 2))
    np.testing.assert_array_equal(one, other)
    several = Sampling([Part(900), Part(90), Part(2)], seed=0, held_out=100).held_out
    assert np.histogram(several, [0, 900, 990, 992])[0].tolist() == [91, 9, 0]
    all_but_one = Sampling([Part(4), Part(3)], seed=0, held_out=5)
    assert sorted(all_but_one.items(0, 2)[0] // 4) == [0, 1]


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_all_orders_are_about_as_likely(count: int) -> None:
    orders = np.concatenate(
        [_epochs(Sampling([Part(count)], seed=seed, held_out=0), count, 50) for seed in range(100)]
    )
    for place in range(count):  # chi-squared, five deviations above its mean
        seen = np.bincount(orders[:, place], minlength=count)
        expected = len(orders) / count
        statistic = float(((seen - expected) ** 2 / expected).sum())
        assert statistic < count - 1 + 5 * math.sqrt(2 * (count - 1))


def test_epochs_and_neighbours_are_unrelated() -> None:
    orders = _epochs(Sampling([Part(1000)], seed=3, held_out=0), 1000, 300)
    deviation = 1000**-0.5
    between = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(orders)]
    assert abs(np.mean(between)) < 5 * deviation / math.sqrt(len(between))
    steps = np.bincount(np.diff(orders).ravel() % 1000, minlength=1000)[1:]
    statistic = float(((steps - steps.mean()) ** 2 / steps.mean()).sum())
    assert statistic < 998 + 5 * math.sqrt(2 * 998)
    one, other = (Sampling([Part(1000)], seed=seed).items(0, 900)[0] for seed in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 * deviation


def test_a_billion_items_take_no_memory() -> None:
    tracemalloc.start()
    sampling = Sampling([Part(40 * BILLION, 2.0), Part(BILLION, 1.0), Part(10, 1.0)], seed=0)
    index, _ = sampling.items(10**12, 4096)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    assert index.min() >= 0
    assert index.max() < 41 * BILLION + 10


def test_a_step_costs_the_same_at_any_size() -> None:
    def cost(count: int) -> float:
        sampling = Sampling([Part(count)], seed=0)
        started = time.process_time()
        for step in range(50):
            sampling.items(step * 1024, 1024)
        return time.process_time() - started

    cost(10_000)
    small, large = (min(cost(count) for _ in range(3)) for count in (10_000, BILLION))
    assert large < 3 * small


@settings(max_examples=20)
@given(st.integers(1, 2**40))
def test_any_count(count: int) -> None:
    sampling = Sampling([Part(count)], seed=0)
    index, _ = sampling.items(0, min(300, sampling.train_count))
    assert len(set(index.tolist())) == len(index)
    assert index.max() < count
    assert not set(index.tolist()) & set(sampling.held_out.tolist())


@pytest.mark.parametrize(
    ("parts", "how", "message"),
    [
        ([], {}, "at least one source"),
        ([(10, 1.0), (10, None)], {}, "a weight to every source of the training data, or to none"),
        ([(10, None)], {"held_out": 10}, "cannot hold 10 of 10 pictures .* choose 0 to 9"),
        ([(10, None), (3, None)], {"held_out": 12}, "cannot hold 12 of 13 .* choose 0 to 11"),
        ([(10, None)], {"held_out": -1}, "cannot hold -1 of 10"),
        ([(10, None)], {"seed": -1}, "seed must be 0 or more"),
        ([(0, None)], {}, "0 items"),
        ([(5, 0.0)], {}, "weight .* is 0: give one above 0"),
        ([(5, math.nan)], {}, "weight .* is nan: give one above 0"),
        ([(5, math.inf)], {}, "weight .* is inf: give one above 0"),
    ],
)
def test_impossible_mixtures(
    parts: list[tuple[int, float | None]], how: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling([Part(*part) for part in parts], **how)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (0, -1)])
def test_impossible_positions(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="position and a count of 0 or more"):
        Sampling([Part(5)]).items(first, count)
