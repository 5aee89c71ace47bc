from pathlib import Path

from edgeclip.export.quantizing.config import Float16, Float32, key
from edgeclip.export.quantizing.group_gains import Gains, GroupGain
from edgeclip.export.quantizing.point import Point
from edgeclip.export.quantizing.point_store import PointStore
from tests.export.quantizing.search_cases import SumBench


def point() -> Point:
    return SumBench(damages={"a": 0.001}, saved={"a": 0.1}).point(Float32())


def test_a_point_is_found_again_by_its_config_and_nothing_else(tmp_path: Path) -> None:
    store = PointStore(tmp_path, "graph, data, bounds")
    assert store.get(Float32()) is None
    store.put(point())
    assert store.get(Float32()) == point()
    assert PointStore(tmp_path, "graph, data, bounds").get(Float32()) == point()
    assert store.get(Float16()) is None
    assert PointStore(tmp_path, "graph, other data, bounds").get(Float32()) is None


def test_what_cannot_be_read_is_measured_again(tmp_path: Path) -> None:
    store = PointStore(tmp_path, "all")
    store.put(point())
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    for broken in ("", whole[: len(whole) // 2], "[]", '{"config": {"kind": "fp32"}}'):
        file.write_text(broken, encoding="utf-8")
        assert store.get(Float32()) is None
    store.put(point())
    assert store.get(Float32()) == point()


def test_a_writer_that_was_killed_leaves_nothing_that_is_taken_for_a_point(tmp_path: Path) -> None:
    store = PointStore(tmp_path, "all")
    store.put(point())
    (file,) = tmp_path.iterdir()
    half = tmp_path / f".edgeclip-tmp-999999999-00000000.{file.name}"
    file.rename(half)
    assert store.get(Float32()) is None
    store.put(point())
    assert list(tmp_path.iterdir()) == [file]


def test_records_are_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> Gains:
        made.append(1)
        return Gains(groups=(GroupGain(nodes=("a",), saved=0.1),), measured=True)

    store = PointStore(tmp_path, "all")
    first = store.remember(Gains, key(Float32()), make)
    again = PointStore(tmp_path, "all").remember(Gains, key(Float32()), make)
    assert first == again
    assert len(made) == 1
    store.remember(Gains, key(Float16()), make)
    assert len(made) == 2
