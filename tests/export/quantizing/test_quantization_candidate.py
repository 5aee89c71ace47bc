"""Candidates of the search: their gates, ranking and records."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.export.quantizing.activation_ranges import Ranging
from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    Float32,
    StaticInt8,
    WeightOnly,
)
from edgeclip.export.quantizing.node_groups import Gains, GroupGain
from edgeclip.export.quantizing.quantization_candidate import QuantizationCandidate, RecordStore
from edgeclip.runtime.bundle.manifest import DataRecord
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.stats.interval import Interval
from tests.export.quantizing.search_cases import SumBench, cosine_record, loss_record

BENCH = SumBench(damages={"a": 0.001}, saved={"a": 0.1})
LOSS = replace(
    loss_record("R@1 loss int8 images, fp32 texts", 1.5, 1.0),
    low=0.5,
    high=2.5,
    outcome="undecided",
    data=DataRecord("some", 32, "0" * 64),
)


@pytest.mark.parametrize(
    "config",
    [
        Float32(),
        Float16(islands=("a",)),
        Float8(),
        StaticInt8(symmetric=False, reduce_range=True, kept=("a",), smoothing=(("norm", 0.5),)),
        StaticInt8(symmetric=True, ranging=Ranging(method="percentile", percentile=99.9)),
        DynamicInt8(kept=("a",)),
        WeightOnly(bits=4, block=64),
    ],
)
def test_points_of_every_kind_come_back_from_json_as_they_were(config: Config) -> None:
    point = replace(BENCH.evaluate(Float32()), config=config, records=(cosine_record(0.99), LOSS))
    assert QuantizationCandidate.from_json(point.to_json(), source="point") == point
    bare = replace(point, latency=None, records=())
    assert QuantizationCandidate.from_json(bare.to_json(), source="point") == bare


def test_gates_are_found_by_what_they_measure() -> None:
    point = replace(BENCH.evaluate(Float32()), records=(cosine_record(0.999), LOSS))
    assert point.cosine == Interval(0.999, 0.999, 0.999)
    assert point.r1_loss == Interval(1.5, 0.5, 2.5)
    assert point.p1_cosine is None
    assert point.zero_shot_loss is None
    assert not point.passed
    assert replace(point, records=point.records[:1]).passed


def test_the_order_of_names_does_not_make_another_point() -> None:
    first, second = (
        replace(BENCH.evaluate(Float32()), config=StaticInt8(symmetric=False, kept=kept))
        for kept in (("a", "b"), ("b", "a"))
    )
    assert first.key == second.key
    assert first.key != BENCH.evaluate(Float32()).key


@pytest.mark.parametrize("change", [{"bytes": "many"}, {"config": {"kind": "fp64"}}, {"more": 1}])
def test_what_is_no_point_is_refused(change: dict[str, object]) -> None:
    data = {**json.loads(BENCH.evaluate(Float32()).to_json()), **change}
    with pytest.raises(ConfigError, match="point is not valid"):
        QuantizationCandidate.from_json(json.dumps(data), source="point")


FOUND = Gains(groups=(GroupGain(nodes=("a",), saved=0.1),), measured=True)


def make() -> Gains:
    return FOUND


def test_a_record_is_found_again_by_all_it_depends_on_and_nothing_else(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, "graph, data, bounds")
    assert store.load(Gains, "config") is None
    assert store.load_or_make(Gains, "config", make) == FOUND
    assert store.load(Gains, "config") == FOUND
    assert RecordStore(tmp_path, "graph, data, bounds").load(Gains, "config") == FOUND
    assert store.load(Gains, "another config") is None
    assert RecordStore(tmp_path, "graph, other data, bounds").load(Gains, "config") is None


def test_what_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, "all")
    store.load_or_make(Gains, "config", make)
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    for broken in ("", whole[: len(whole) // 2], "[]", '{"schema_version": 1, "measured": true}'):
        file.write_text(broken, encoding="utf-8")
        assert store.load(Gains, "config") is None
    store.load_or_make(Gains, "config", make)
    assert store.load(Gains, "config") == FOUND


def test_a_writer_that_was_killed_leaves_nothing_that_is_taken_for_a_record(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, "all")
    store.load_or_make(Gains, "config", make)
    (file,) = tmp_path.iterdir()
    half = tmp_path / f".edgeclip-tmp-999999999-00000000.{file.name}"
    file.rename(half)
    assert store.load(Gains, "config") is None
    store.load_or_make(Gains, "config", make)
    assert list(tmp_path.iterdir()) == [file]


def test_records_are_made_once(tmp_path: Path) -> None:
    made = []

    def counted() -> Gains:
        made.append(1)
        return FOUND

    for what, count in (("config", 1), ("config", 1), ("another config", 2)):
        RecordStore(tmp_path, "all").load_or_make(Gains, what, counted)
        assert len(made) == count
