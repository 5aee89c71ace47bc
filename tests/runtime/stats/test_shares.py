import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.stats.interval import Estimate
from edgeclip.runtime.stats.shares import estimate_kept, estimate_loss, estimate_share

# Hits of pairs, both directions: 0, a half or 1.
hits = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40)
pairs = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    min_size=2,
    max_size=40,
)


@pytest.mark.parametrize(("found", "of"), [(5, 10), (40, 50), (80, 100), (900, 1000)])
def test_a_share_has_wilsons_interval(found: int, of: int) -> None:
    interval = estimate_share(np.arange(of) < found).interval
    wilson = stats.binomtest(found, of).proportion_ci(method="wilson")
    assert interval.value == found / of
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)


def test_all_of_fifty_are_not_all_there_are() -> None:
    interval = estimate_share(np.ones(50)).interval
    assert interval.high == 1
    assert interval.low == pytest.approx(0.929, abs=1e-3)  # Wilson: 50 / (50 + 1.96^2)
    none = estimate_share(np.zeros(50)).interval
    assert (none.low, none.high) == pytest.approx((0, 1 - interval.low))


@pytest.mark.parametrize(("missed", "of"), [(1, 1000), (2, 1000), (3, 100), (1, 3)])
def test_few_misses_have_the_exact_bound(missed: int, of: int) -> None:
    share = estimate_share(np.arange(of) >= missed)
    exact = stats.binomtest(of - missed, of).proportion_ci(method="exact")
    assert share.upper_bound(0.975) == pytest.approx(exact.high, rel=1e-6)


def test_both_directions_tell_more_than_one() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.random(500) < 0.7).astype(float), (rng.random(500) < 0.7).astype(float)
    alone, both = estimate_share(one).interval, estimate_share((one + two) / 2).interval
    assert (both.high - both.low) / (alone.high - alone.low) == pytest.approx(0.5**0.5, abs=0.06)


def test_copies_of_items_tell_nothing_new_if_they_are_declared() -> None:
    one = np.random.default_rng(0).random(60) < 0.8
    copies, clusters = np.repeat(one, 5), np.repeat(np.arange(60), 5)
    alone, blind = estimate_share(one).interval, estimate_share(copies).interval
    declared = estimate_share(copies, clusters).interval
    assert blind.high - blind.low < 0.5 * (alone.high - alone.low)
    # Student's t with 59 degrees of freedom is 2% wider than the normal distribution.
    assert (declared.low, declared.high) == pytest.approx((alone.low, alone.high), abs=5e-3)
    assert declared.high - declared.low > alone.high - alone.low


def test_one_cluster_tells_nothing() -> None:
    interval = estimate_share(np.array([1, 1, 0, 1]), np.zeros(4, np.int64)).interval
    assert (interval.low, interval.value, interval.high) == (0, 0.75, 1)


def test_a_picture_with_more_captions_may_count_more() -> None:
    found = np.array([2.0, 1.0, 0.0, 1.0])  # their mean is a share of 1
    assert estimate_share(found).interval.value == 1.0


@given(hits, st.sampled_from([0.6, 0.9, 0.975, 0.999]))
def test_a_share_lies_between_its_bounds_in_0_to_1(values: list[float], confidence: float) -> None:
    share = estimate_share(np.array(values))
    low, high = share.lower_bound(confidence), share.upper_bound(confidence)
    assert 0 <= low <= share.value + 1e-12
    assert share.value - 1e-12 <= high <= 1
    mirrored = estimate_share(1 - np.array(values))
    assert mirrored.lower_bound(confidence) == pytest.approx(1 - high, abs=1e-9)


@given(pairs)
def test_losses_are_antisymmetric_and_mirrored(found: list[tuple[float, float]]) -> None:
    reference, ours = np.array(found).T
    one, other = estimate_loss(reference, ours).interval, estimate_loss(ours, reference).interval
    assert (one.low, one.value, one.high) == pytest.approx(
        (-other.high, -other.value, -other.low), abs=1e-12
    )
    assert -1 <= one.low <= one.value <= one.high <= 1


def test_a_loss_of_many_pairs_has_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    reference = (rng.random(20_000) < 0.9).astype(float)
    ours = np.where(rng.random(20_000) < 0.1, 1 - reference, reference)
    difference = reference - ours
    interval = estimate_loss(reference, ours).interval
    half = 1.96 * difference.std() / 20_000**0.5
    assert interval.value == pytest.approx(difference.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=2e-4
    )


def test_no_loss_seen_does_not_mean_no_loss() -> None:
    """Of 100 pairs without a loss, a true loss of 3.6 points is seen in none in 2.5%."""
    interval = estimate_loss(np.ones(100), np.ones(100)).interval
    assert interval.value == 0
    assert interval.high == pytest.approx(0.037, abs=1e-3)


def test_what_is_kept_by_hand() -> None:
    reference = np.repeat([1.0, 0.0], [900, 100])
    ours = np.where(np.arange(1000) < 45, 0.0, reference)  # 5% of the reference's are lost
    kept = estimate_kept(ours, reference)
    assert kept.value == pytest.approx(0.95)
    # The delta method's interval: 1 - binomial share of lost hits.
    half = 1.96 * (0.95 * 0.05 / 900) ** 0.5
    interval = kept.interval
    assert (interval.low, interval.high) == pytest.approx((0.95 - half, 0.95 + half), abs=4e-3)


def test_equal_models_keep_all_with_an_interval() -> None:
    values = np.repeat([1.0, 0.0], [80, 20])
    interval = estimate_kept(values, values).interval
    assert interval.value == 1
    assert interval.low < 1 < interval.high


def test_a_reference_with_few_hits_bounds_no_ratio() -> None:
    reference = np.arange(200) == 0
    interval = estimate_kept(np.ones(200), reference).interval
    assert (interval.low, interval.high) == (0, float("inf"))
    with pytest.raises(InputError, match="the reference has no hit"):
        estimate_kept(np.ones(3), np.zeros(3))


@pytest.mark.parametrize(
    "values", [np.array([]), np.ones((1, 1)), np.array([np.nan]), np.array([2.0, 3.0])]
)
def test_what_are_no_hits_is_refused(values: Values) -> None:
    with pytest.raises(InputError):
        estimate_share(values)


def test_pairs_must_fit() -> None:
    with pytest.raises(InputError, match="paired values have 3 and 4 items"):
        estimate_loss(np.ones(3), np.ones(4))
    with pytest.raises(InputError, match="give one integer for each of the 3 items"):
        estimate_share(np.ones(3), np.zeros(2, np.int64))


def covered(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([e.interval.low <= truth <= e.interval.high for e in estimates]))


def paired(rng: np.random.Generator, count: int, lost: float, gained: float) -> tuple[Values, ...]:
    reference = rng.random(count) < 0.95
    change = rng.random(count) < np.where(reference, lost / 0.95, gained / 0.05)
    return reference.astype(float), (reference ^ change).astype(float)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "size"), [(27, 1), (100, 1), (100, 5)])
def test_intervals_cover_the_truth(count: int, size: int) -> None:
    """At least 93% where 95% are meant, also near the edge and with declared clusters."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(count), size) if size > 1 else None
    shares, losses, kept = [], [], []
    for _ in range(1000):
        reference, ours = (np.repeat(item, size) for item in paired(rng, count, 0.03, 0.01))
        shares.append(estimate_share(reference, clusters))
        losses.append(estimate_loss(reference, ours, clusters))
        kept.append(estimate_kept(ours, reference, clusters))
    assert covered(list(shares), 0.95) >= 0.93
    assert covered(list(losses), 0.02) >= 0.93
    assert covered(list(kept), 0.93 / 0.95) >= 0.93


@pytest.mark.slow
def test_bounds_hold_where_few_clusters_are_large() -> None:
    """Most pictures are single ones and a few are bursts, of which all are lost or none."""
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(1000):
        sizes = np.where(rng.random(1000) < 0.05, 20, 1)
        lost = np.repeat(rng.random(1000) < 0.02, sizes)
        clusters = np.repeat(np.arange(1000), sizes)
        loss = estimate_loss(np.ones(len(lost)), 1.0 - lost, clusters)
        share = estimate_share(1.0 - lost, clusters)
        wrong += loss.upper_bound(0.975) < 0.02 or share.lower_bound(0.975) > 0.98
    assert wrong <= 25 + 2 * 5
