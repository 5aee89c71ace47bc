import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.export.errors import GateError
from edgeclip.export.gates.gates import (
    DEFAULT_BOUNDS,
    Bounds,
    Gate,
    GateOutcome,
    MeasuredGate,
    describe_missed,
    judge_equality,
    judge_gates,
    judge_tower,
    measure_cosines,
    measure_retrieval,
    measure_zero_shot,
    raise_if_missed,
    without_folders,
)
from edgeclip.export.graph.embedders import PairEmbeddings
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.bundle.manifest import DataRecord, GateRecord
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.stats.shares import estimate_loss
from edgeclip.runtime.stats.three_outcomes import Direction, Outcome

BOUNDS = Bounds(mean_cosine=0.99, p1_cosine=0.97)


def unit(rows: NDArray[np.float64]) -> FloatArray:
    found: FloatArray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def random_rows(count: int = 400, seed: int = 0) -> FloatArray:
    return unit(np.random.default_rng(seed).normal(size=(count, 16)))


def turned(rows: FloatArray, cosine: float) -> FloatArray:
    """Rows whose cosine with the given ones is exactly `cosine`."""
    other = np.roll(rows, 1, axis=1).astype(np.float64)
    across = other - (other * rows).sum(axis=1, keepdims=True) * rows
    return unit(cosine * rows + np.sqrt(1 - cosine**2) * unit(across))


@pytest.mark.parametrize(
    ("direction", "value", "passed"),
    [
        (">=", 0.99, True),
        (">=", 0.9899, False),
        ("<=", 0.99, True),
        ("<=", 0.9901, False),
        # A miss by rounding is none, and a miss by more is one.
        (">=", 0.99 - 1e-15, True),
        ("<=", 0.99 + 1e-15, True),
        (">=", 0.99 - 1e-7, False),
        ("<=", 0.99 + 1e-7, False),
    ],
)
def test_a_value_of_the_items_alone_is_held_against_the_bound(
    direction: Direction, value: float, passed: bool
) -> None:
    record = Gate("cosine", direction, 0.99, "cosine").judge_items(value)
    assert record.outcome == ("passed" if passed else "failed")
    assert record.low == record.high == value


@pytest.mark.parametrize(
    ("lost", "outcome"), [(0, "passed"), (20, "undecided"), (25, "undecided"), (80, "failed")]
)
def test_a_gate_of_a_population_has_three_outcomes(lost: int, outcome: str) -> None:
    hits = np.ones(2000)
    candidate = hits.copy()
    candidate[:lost] = 0  # 20 of 2,000 is the bound itself
    measured = MeasuredGate(
        gate=Gate("R@1 loss", "<=", 1.0, "points"),
        estimate=estimate_loss(hits, candidate),
        scale=100,
    )
    (record,) = judge_gates([measured])
    assert record.outcome == outcome
    assert record.value == pytest.approx(lost / 20)
    assert record.low <= record.value <= record.high


def test_equal_embeddings_pass_every_gate() -> None:
    rows = random_rows()
    records = judge_tower(rows, rows, DEFAULT_BOUNDS["fp32"])
    assert [record.name for record in records] == [
        "usable embeddings",
        "mean cosine",
        "1st-percentile cosine",
    ]
    assert all(record.passed for record in records)
    assert records[1].value == pytest.approx(1)


def test_a_small_turn_of_every_row_is_measured() -> None:
    rows = random_rows()
    _, mean, low = judge_tower(turned(rows, 0.98), rows, BOUNDS)
    assert mean.value == pytest.approx(0.98, abs=1e-6)
    assert mean.passed is False
    assert low.value == pytest.approx(0.98, abs=1e-6)
    assert low.passed is True


def test_a_few_ruined_rows_are_seen_by_the_percentile() -> None:
    rows = random_rows()
    candidate = rows.copy()
    candidate[:12] = turned(rows[:12], 0.5)
    _, mean, low = judge_tower(candidate, rows, BOUNDS)
    assert mean.value == pytest.approx(0.985, abs=1e-6)
    assert low.value == pytest.approx(0.5, abs=1e-6)
    assert low.outcome == "failed"


def test_too_few_rows_tell_nothing_of_a_percentile() -> None:
    rows = random_rows(367)
    *_, low = judge_tower(rows, rows, BOUNDS)
    assert (low.outcome, low.low) == ("undecided", -1)
    *_, low = judge_tower(random_rows(368), random_rows(368), BOUNDS)
    assert low.outcome == "passed"


def test_equality_is_of_every_single_input() -> None:
    rows = random_rows(50)
    assert all(record.passed for record in judge_equality(rows, rows, BOUNDS))
    candidate = rows.copy()
    candidate[:1] = turned(rows[:1], 0.9)  # one of fifty
    whole, mean, least = judge_equality(candidate, rows, BOUNDS)
    assert (whole.passed, mean.passed, least.passed) == (True, True, False)
    assert least.value == pytest.approx(0.9, abs=1e-6)
    candidate[3] = np.nan
    assert [item.outcome for item in judge_equality(candidate, rows, BOUNDS)] == ["failed"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_embeddings_that_are_none_miss_a_gate_of_their_own(value: float) -> None:
    rows = random_rows()
    candidate = rows.copy()
    candidate[7] = value
    (record,) = judge_tower(candidate, rows, BOUNDS)
    assert (record.name, record.passed) == ("usable embeddings", False)
    assert record.value == pytest.approx(399 / 400)


def judge_retrieval(
    candidate: PairEmbeddings,
    reference: PairEmbeddings,
    relevance: Relevance | None = None,
) -> GateRecord:
    measured = measure_retrieval(candidate, reference, BOUNDS, "int8", relevance=relevance)
    return judge_gates([measured])[0]


def test_lost_retrieval_is_counted_in_points() -> None:
    rows = random_rows(500)
    reference = PairEmbeddings(rows, rows)
    swapped = rows.copy()
    swapped[:20] = np.roll(swapped[:20], 1, axis=0)  # 20 of 500 pairs are lost, both ways
    record = judge_retrieval(PairEmbeddings(swapped, rows), reference)
    assert record.name == "R@1 loss int8"
    assert record.value == pytest.approx(4)
    assert record.low < 4 < record.high
    assert record.outcome == "failed"
    # What is gained is a negative loss.
    gained = judge_retrieval(reference, PairEmbeddings(swapped, rows))
    assert gained.value == pytest.approx(-4)
    assert gained.outcome == "passed"


@pytest.mark.parametrize("copies", [1, 2, 10])
@pytest.mark.parametrize("known", [True, False])
def test_random_embeddings_fail_however_often_a_caption_occurs(copies: int, known: bool) -> None:
    rows = np.repeat(random_rows(50), copies, axis=0)
    captions = [[f"picture {index // copies}"] for index in range(50 * copies)]
    relevance = Relevance.of_captions(captions) if known else None
    reference = PairEmbeddings(rows, rows)
    noise = random_rows(50 * copies, seed=1)
    for candidate in (PairEmbeddings(noise, rows), PairEmbeddings(rows, noise)):
        record = judge_retrieval(candidate, reference, relevance)
        assert record.value > 50
        assert record.outcome == "failed"
    same = judge_retrieval(reference, reference, relevance)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_a_candidate_that_collapsed_fails() -> None:
    rows = np.repeat(random_rows(50), 2, axis=0)
    one = np.repeat(random_rows(1), 100, axis=0)
    record = judge_retrieval(PairEmbeddings(one, one), PairEmbeddings(rows, rows))
    assert record.value == 100


def test_five_captions_a_picture_are_one_item_of_the_interval() -> None:
    rows = random_rows(100)
    relevance = Relevance.of_captions(
        [[f"{k} of {index}" for k in range(5)] for index in range(100)]
    )
    texts = np.repeat(rows, 5, axis=0)
    swapped = rows.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    record = judge_retrieval(PairEmbeddings(swapped, texts), PairEmbeddings(rows, texts), relevance)
    assert record.value == pytest.approx(2)
    one = judge_retrieval(PairEmbeddings(swapped, rows), PairEmbeddings(rows, rows))
    assert (record.low, record.high) == pytest.approx((one.low, one.high))


def test_captions_that_tell_no_picture_apart_are_refused() -> None:
    rows = random_rows(20)
    same = np.repeat(random_rows(1), 20, axis=0)
    with pytest.raises(ConfigError, match="give captions that tell the pictures apart"):
        judge_retrieval(PairEmbeddings(rows, same), PairEmbeddings(rows, same))


def test_lost_labels_are_counted_in_points() -> None:
    labels = LabelSet(names=("a", "b"), embeddings=np.eye(2, 16, dtype=np.float32), space="7" * 64)
    right = np.arange(100) % 2
    reference = np.eye(2, 16, dtype=np.float32)[right]
    candidate = reference.copy()
    candidate[:3] = candidate[:3, ::-1]  # three of a hundred pictures now look like no label
    data = DataRecord("pictures", 100, "0" * 64)
    measured = measure_zero_shot(candidate, reference, labels, right, BOUNDS, data)
    (record,) = judge_gates([measured])
    assert (record.name, record.unit, record.bound) == ("zero-shot top-1 loss", "points", 0.5)
    assert record.value == pytest.approx(3)
    assert record.low < 3 < record.high
    assert record.outcome == "undecided"  # 3 of 100 pictures
    assert record.data == data
    # A picture that neither gets right is no loss, but 100 pictures do not show that none is lost.
    (wrong,) = judge_gates([measure_zero_shot(candidate, candidate, labels, right, BOUNDS)])
    assert wrong.value == 0
    assert wrong.low < 0 < wrong.high


def test_what_is_quantized_keeps_these_bounds() -> None:
    for precision in ("int8", "fp8"):
        bounds = DEFAULT_BOUNDS[precision]
        assert (bounds.mean_cosine, bounds.p1_cosine) == (0.995, 0.98)
        assert (bounds.r1_loss, bounds.zero_shot_loss) == (1.0, 0.5)
    stricter = DEFAULT_BOUNDS["fp16"]
    assert stricter.mean_cosine > 0.995
    assert stricter.p1_cosine > 0.98


def record(gate: Gate, value: float, low: float, high: float, outcome: Outcome) -> GateRecord:
    data = DataRecord("pairs", 300, "0" * 64)
    judged = gate.judge_items(value, data)
    return replace(judged, low=low, high=high, outcome=outcome, confidence=0.95)


def test_a_refusal_names_every_missed_gate_with_its_gap() -> None:
    low = record(Gate("mean cosine", ">=", 0.99, "cosine"), 0.9, 0.8, 0.95, "failed")
    high = record(Gate("R@1 loss int8", "<=", 1.0, "points"), 3.5, 2, 5, "failed")
    good = record(Gate("1st-percentile cosine", ">=", 0.97, "cosine"), 0.98, 0.97, 0.99, "passed")
    judged = [
        GateOutcome("image int8", low),
        GateOutcome("image int8", good),
        GateOutcome("bundle", high),
    ]
    assert len(describe_missed(judged)) == 2
    with pytest.raises(GateError) as caught:
        raise_if_missed(judged, "Train longer.")
    message = str(caught.value)
    assert "image int8: mean cosine is 0.9 (bound >= 0.99 cosine, missed by 0.09)" in message
    assert "bundle: R@1 loss int8 is 3.5 (bound <= 1 points, missed by 2.5)" in message
    assert "1st-percentile" not in message
    assert message.endswith("Train longer.")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/ann/photos, 240 pictures", "photos, 240 pictures"),
        (
            "export /home/ann/s --out=/tmp/x/b/ --data ~/p ../q",
            "export s --out=b --data p q",
        ),
        ("'/home/ann/student'", "'student'"),
        (
            "a/cats, 3 pictures + /b/dogs, 2 pictures",
            "a/cats, 3 pictures + dogs, 2 pictures",
        ),
        ("openai/clip-vit-base-patch32@abc", "openai/clip-vit-base-patch32@abc"),
        ("https://example.org/a/b, runs/demo", "https://example.org/a/b, runs/demo"),
        ("image/text loss of 3 / 4", "image/text loss of 3 / 4"),
    ],
)
def test_no_folder_of_this_computer_is_told(text: str, left: str) -> None:
    assert without_folders(text) == left


def test_items_that_set_no_bound_are_said_to() -> None:
    endless = record(Gate("kept R@1", "<=", 1.0, "share"), 0.5, 0.2, math.inf, "undecided")
    with pytest.raises(GateError, match=r"interval at least 0.2 .*300 items set no bound on it"):
        raise_if_missed([GateOutcome("bundle", endless)], "")


def test_what_is_undecided_is_told_with_what_would_decide() -> None:
    unsure = record(Gate("R@1 loss int8", "<=", 1.0, "points"), 0.5, -0.7, 1.7, "undecided")
    judged = [GateOutcome("bundle", unsure)]
    with pytest.raises(GateError) as caught:
        raise_if_missed(judged, "Train longer.")
    message = str(caught.value)
    assert "undecided: 0.5, interval -0.7 to 1.7 (bound <= 1 points)" in message
    assert "300 items tell 1.2 points from nothing" in message
    assert "about 1,800 would decide" in message  # 300 x (1.2 / 0.5)^2 = 1,728
    assert "Train longer" not in message
    raise_if_missed(judged, "", accept_undecided=True)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_handful_of_pairs_is_told_without_a_fault(count: int) -> None:
    rows = random_rows(count)
    measured = (
        *measure_cosines(rows, rows, BOUNDS, DataRecord("pairs", count, "0" * 64)),
        MeasuredGate(
            gate=Gate("R@1 loss", "<=", 1.0, "points"),
            estimate=estimate_loss(np.ones(count), np.zeros(count)),
            scale=100,
            data=DataRecord("pairs", count, "0" * 64),
        ),
    )
    records = judge_gates(measured)
    assert all(math.isfinite(end) for item in records for end in (item.low, item.high))
    assert describe_missed([GateOutcome("image int8", item) for item in records])


def test_nothing_missed_is_no_refusal() -> None:
    good = Gate("mean cosine", ">=", 0.9, "cosine").judge_items(0.98)
    raise_if_missed([GateOutcome("image int8", good)], "")
