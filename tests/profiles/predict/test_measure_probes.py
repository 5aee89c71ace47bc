import argparse
import dataclasses
import shlex
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeclip.profiles.cli import measure_probes as measure_probes_command
from edgeclip.profiles.cli.measure_probes import measured_table
from edgeclip.profiles.predict import measure_probes as module
from edgeclip.profiles.predict.measure_probes import (
    interleaved_times,
    measure_probes,
)
from edgeclip.profiles.predict.measured_device import MeasuredDevice, load_measured
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.probe_set import (
    PROBES_NAME,
    CheckTower,
    GraphInput,
    Probe,
    ProbeIndex,
    ProbeSet,
    ProbeSetError,
)
from edgeclip.profiles.predict.tower_shapes import BlockCount, ConvTower
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.bundle.manifest import FileRecord
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import Engine, open_engine
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.errors import EngineError, InputError
from edgeclip.runtime.stats.interval import Interval
from tests.profiles.predict.known_device import known_device

pytestmark = pytest.mark.slow

TOWER = ConvTower(widths=(8,), depths=(4,), image_size=16, dim=8)


def write_graph(path: Path, products: int) -> GraphInput:
    """So many products of 4 x 4 pixels with themselves."""
    nodes = [helper.make_node("Cast", ["pixels"], ["value_0"], to=TensorProto.FLOAT)]
    nodes += [
        helper.make_node("MatMul", [f"value_{at}", "value_0"], [f"value_{at + 1}"])
        for at in range(products)
    ]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, 4, 4])],
        [helper.make_tensor_value_info(f"value_{products}", TensorProto.FLOAT, [1, 4, 4])],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return GraphInput(path=path.name, name="pixels", dtype="uint8", shape=(1, 4, 4), weight_bytes=0)


def write_set(folder: Path) -> Path:
    """A stem, a head beyond it, blocks beyond that, and a whole tower; two are of the few."""
    folder.mkdir(exist_ok=True)
    graphs = {name: write_graph(folder / f"{name}.onnx", at) for at, name in enumerate("abcd", 1)}
    index = ProbeIndex(
        created="2026-11-21T12:00:00+00:00",
        command="edgeclip probes --out probes",
        device="test-cpu",
        needs_vnni=False,
        seed=0,
        probes=(
            Probe(name="stem", precision="fp32", graph=graphs["a"], piece=TOWER.stem(), few=True),
            Probe(
                name="head",
                precision="fp32",
                graph=graphs["b"],
                piece=TOWER.head(),
                beyond="stem",
                few=True,
            ),
            Probe(
                name="blocks",
                precision="int8",
                graph=graphs["c"],
                piece=TOWER.block(0),
                count=4,
                beyond="head",
            ),
        ),
        checks=(
            CheckTower(
                name="whole",
                precision="int8",
                graph=graphs["d"],
                parts=(*TOWER.parts(), BlockCount(piece=TOWER.head(), count=1)),
            ),
        ),
        files=tuple(
            FileRecord(path.name, path.stat().st_size, sha256_file(path))
            for path in sorted(folder.glob("*.onnx"))
        ),
    )
    index.save(folder / PROBES_NAME)
    return folder


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("probes") / "set")


@pytest.fixture(scope="module")
def measured(probes: Path) -> MeasuredDevice:
    device = DeviceProfile(
        name="test-cpu",
        description="one thread",
        engine="onnxruntime-cpu",
        precisions=("fp32", "int8"),
        threads=1,
        memory_mb=None,
    )
    return measure_probes(
        ProbeSet.open(probes), device=device, name="here", command="typed", rounds=6
    )


def test_every_probe_and_tower_is_measured(measured: MeasuredDevice) -> None:
    assert [cost.probe for cost in measured.costs] == ["stem", "head", "blocks"]
    assert all(len(cost.samples_ms) == 6 for cost in measured.costs)
    assert measured.costs[0].ms.value > 0
    assert [check.name for check in measured.checks] == ["whole"]
    assert measured.precisions == ("fp32", "int8")
    assert measured.before is not None
    assert measured.interference is not None


def test_round_trip_and_table(measured: MeasuredDevice, tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    measured.save(path)
    assert load_measured(path) == load_measured(str(path)) == measured
    table = measured_table(measured)
    assert "conv-block" in table
    assert "1 whole tower in int8: predicted within" in table


def test_only_the_few_and_only_what_the_device_allows(
    probes: Path, cpu_device: DeviceProfile
) -> None:
    opened = ProbeSet.open(probes)
    few = measure_probes(opened, device=cpu_device, name="few", command="typed", rounds=5, few=True)
    assert [cost.probe for cost in few.costs] == ["stem", "head"]
    assert few.checks == ()
    plain = dataclasses.replace(cpu_device, precisions=("fp16",))
    found = measure_probes(opened, device=plain, name="plain", command="typed", rounds=5)
    assert {cost.precision for cost in found.costs} == {"fp32"}


def test_int8_for_dot_products_is_not_run_without_them(
    probes: Path, cpu_device: DeviceProfile
) -> None:
    opened = ProbeSet.open(probes)
    index = dataclasses.replace(opened.index, needs_vnni=True)
    found = measure_probes(
        dataclasses.replace(opened, index=index),
        device=cpu_device,
        name="old",
        command="typed",
        rounds=5,
    )
    assert found.precisions == ("fp32",)


def test_one_group_is_let_go_before_the_next_is_loaded(
    probes: Path, cpu_device: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[weakref.ref[object]] = []
    alive: list[int] = []

    def counted(path: Path, *, device: DeviceProfile) -> Engine:
        alive.append(sum(session() is not None for session in sessions))
        engine = open_engine(path, device=device)
        assert isinstance(engine, OrtEngine)
        sessions.append(weakref.ref(engine._session))
        return engine

    monkeypatch.setattr(module, "open_engine", counted)
    monkeypatch.setattr(module, "_MEMORY", -1)  # each family is a group
    measure_probes(ProbeSet.open(probes), device=cpu_device, name="x", command="typed", rounds=5)
    assert alive == [0, 1, 2, 0]


def test_too_few_rounds(probes: Path, cpu_device: DeviceProfile) -> None:
    with pytest.raises(InputError, match="at least 5 rounds, got 4"):
        measure_probes(
            ProbeSet.open(probes), device=cpu_device, name="x", command="typed", rounds=4
        )


def test_a_graph_that_cannot_be_run(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    folder = write_set(tmp_path / "set")
    opened = ProbeSet.open(folder)
    (folder / "b.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"b\.onnx"):
        measure_probes(opened, device=cpu_device, name="x", command="typed", rounds=5)


def test_short_runs_are_repeated_more_often_in_a_turn() -> None:
    calls = {"slow": 0, "fast": 0}
    rounds: list[int] = []

    def sleep(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    runs = {"slow": sleep("slow", 0.010), "fast": sleep("fast", 0.001)}
    found = interleaved_times(runs, 5, rounds.append)
    assert np.min(found["slow"]) >= 10  # milliseconds; a busy machine sleeps longer, never less
    assert np.min(found["fast"]) >= 1
    assert len(found["slow"]) == len(found["fast"]) == 5
    assert calls["fast"] > calls["slow"] >= 2 * 5
    assert rounds == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "a.onnx").unlink(), r"a\.onnx is missing"),
        (lambda folder: (folder / "a.onnx").write_bytes(b"x"), r"a\.onnx was altered"),
        (lambda folder: (folder / PROBES_NAME).unlink(), "give the directory that"),
        (lambda folder: (folder / PROBES_NAME).write_text("{"), "is not JSON"),
    ],
)
def test_a_damaged_set_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = write_set(tmp_path / "set")
    spoil(folder)
    with pytest.raises(ProbeSetError, match=message):
        ProbeSet.open(folder)


def test_a_set_must_hold_what_it_compares(probes: Path) -> None:
    index = ProbeSet.open(probes).index
    lost = dataclasses.replace(index.probes[1], beyond="nobody")
    with pytest.raises(ValueError, match="compared with a probe that is not there"):
        dataclasses.replace(index, probes=(lost,), checks=())
    stem, head, blocks = index.probes
    for wrong, message in (
        ((dataclasses.replace(stem, few=False), head), "head is one of the few, and stem before"),
        (
            (stem, dataclasses.replace(head, few=False), dataclasses.replace(blocks, few=True)),
            "blocks is one of the few, and head before it is not",
        ),
        ((dataclasses.replace(stem, beyond="head"), head), "compared with others in a circle"),
        ((dataclasses.replace(stem, beyond="stem"),), "compared with others in a circle"),
        (
            (dataclasses.replace(stem, precision="int8"), head),
            "head in fp32 is compared with stem in int8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(index, probes=wrong, checks=())
    with pytest.raises(ValueError, match="the same name"):
        dataclasses.replace(index, probes=(index.probes[0],) * 2)
    with pytest.raises(ValueError, match=r"does not list a\.onnx"):
        dataclasses.replace(index, files=())


def test_the_command_measures_and_transfers(
    probes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, few = tmp_path / "whole.json", tmp_path / "few.json"
    assert _run(str(probes), "--out", str(whole), "--rounds", "5") == 0
    printed = capsys.readouterr().out
    assert f"costs written to {whole}" in printed
    found = MeasuredDevice.load(whole)
    assert found.name == "whole"
    assert found.command.startswith(f"edgeclip measure-probes {probes}")
    with pytest.raises(InputError, match="shares 2 blocks with 'whole', at least 3"):
        _run(str(probes), "--out", str(few), "--rounds", "5", "--few-from", str(whole))


def _run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    measure_probes_command.add_arguments(parser)
    typed = argparse.Namespace(command=shlex.join(["edgeclip", "measure-probes", *words]))
    return measure_probes_command.run(parser.parse_args(words, typed))


def test_of_two_towers_the_median_error_lies_between() -> None:
    device = known_device()
    one = next(check for check in device.checks if check.precision == "fp32")
    ms = Predictor(device).predict_blocks(one.parts, "fp32").ms
    both = tuple(
        dataclasses.replace(one, ms=Interval(ms / high, ms / high, ms / high))
        for high in (1.1, 1.3)
    )
    table = measured_table(dataclasses.replace(device, checks=both))
    assert "2 whole towers in fp32: predicted within 20.0% (median; worst 30.0%)" in table
