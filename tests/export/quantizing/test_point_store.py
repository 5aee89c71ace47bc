from pathlib import Path

from edgeclip.export.quantizing.node_groups import Gains, GroupGain
from edgeclip.export.quantizing.quantization_candidate import PointStore

FOUND = Gains(groups=(GroupGain(nodes=("a",), saved=0.1),), measured=True)


def make() -> Gains:
    return FOUND


def test_a_record_is_found_again_by_all_it_depends_on_and_nothing_else(tmp_path: Path) -> None:
    store = PointStore(tmp_path, "graph, data, bounds")
    assert store.find(Gains, "config") is None
    assert store.remember(Gains, "config", make) == FOUND
    assert store.find(Gains, "config") == FOUND
    assert PointStore(tmp_path, "graph, data, bounds").find(Gains, "config") == FOUND
    assert store.find(Gains, "another config") is None
    assert PointStore(tmp_path, "graph, other data, bounds").find(Gains, "config") is None


def test_what_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    store = PointStore(tmp_path, "all")
    store.remember(Gains, "config", make)
    (file,) = tmp_path.iterdir()
    whole = file.read_text(encoding="utf-8")
    for broken in ("", whole[: len(whole) // 2], "[]", '{"schema_version": 1, "measured": true}'):
        file.write_text(broken, encoding="utf-8")
        assert store.find(Gains, "config") is None
    store.remember(Gains, "config", make)
    assert store.find(Gains, "config") == FOUND


def test_a_writer_that_was_killed_leaves_nothing_that_is_taken_for_a_record(tmp_path: Path) -> None:
    store = PointStore(tmp_path, "all")
    store.remember(Gains, "config", make)
    (file,) = tmp_path.iterdir()
    half = tmp_path / f".edgeclip-tmp-999999999-00000000.{file.name}"
    file.rename(half)
    assert store.find(Gains, "config") is None
    store.remember(Gains, "config", make)
    assert list(tmp_path.iterdir()) == [file]


def test_records_are_made_once(tmp_path: Path) -> None:
    made = []

    def counted() -> Gains:
        made.append(1)
        return FOUND

    for what, count in (("config", 1), ("config", 1), ("another config", 2)):
        PointStore(tmp_path, "all").remember(Gains, what, counted)
        assert len(made) == count
