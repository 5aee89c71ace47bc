import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeclip.export.cli import probes as probes_command
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.probes.probe_plan import (
    PLANS,
    STANDARD,
    ConvProbeSize,
    ImageProbeSize,
    ProbePlan,
    TextProbeSize,
)
from edgeclip.export.probes.random_towers import example, random_dual
from edgeclip.export.probes.write_probes import write_probes
from edgeclip.profiles.predict.measure_probes import measure_probes
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.probe_set import WEIGHTS_NAME, ProbeSet
from edgeclip.profiles.predict.tower_shapes import ConvTower, TransformerTower
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import InputError

pytestmark = pytest.mark.slow

SIZE = ImageProbeSize(width=256, image_size=32, patch=16)
PAIR = ProbePlan(images=(SIZE,), texts=(), convs=())
STEM = ProbePlan(images=(), texts=(), convs=(), stems=(SIZE,))


@pytest.fixture(scope="module")
def device(cpu_device: DeviceProfile) -> DeviceProfile:
    return replace(cpu_device, vnni=True)


@pytest.fixture(scope="module")
def probes(device: DeviceProfile, tmp_path_factory: pytest.TempPathFactory) -> ProbeSet:
    """A stem, and an image tower of one layer and of six, in fp32 and int8."""
    out = tmp_path_factory.mktemp("probes") / "set"
    return write_probes(out, device=device, command="typed", plan=PAIR)


def test_graphs_share_one_file_of_weights(probes: ProbeSet) -> None:
    paths = sorted(path.name for path in probes.path.iterdir())
    assert paths == [
        "image-32px-p16-w256-l1-fp32.onnx",
        "image-32px-p16-w256-l1-int8.onnx",
        "image-32px-p16-w256-l6-fp32.onnx",
        "image-32px-p16-w256-l6-int8.onnx",
        "probes.json",
        "stem-image-32px-p16-w256-fp32.onnx",
        WEIGHTS_NAME,
    ]
    kept = sum(path.stat().st_size for path in probes.path.iterdir())
    assert 4 * kept < sum(probe.graph.weight_bytes for probe in probes.index.probes)


def test_no_two_weights_of_a_graph_are_equal(probes: ProbeSet) -> None:
    for path in probes.path.glob("image-*.onnx"):
        values = [numpy_helper.to_array(item) for item in load_graph(path).graph.initializer]
        large = [value.tobytes() for value in values if value.nbytes >= 4096]
        assert len(large) > 6
        assert len(set(large)) == len(large)


def test_int8_graphs_compute_in_int8(probes: ProbeSet) -> None:
    for probe in probes.index.probes:
        graph = onnx.load(probes.graph_path(probe.graph), load_external_data=False).graph
        kinds = {node.op_type for node in graph.node}
        assert ("DequantizeLinear" in kinds) is (probe.precision == "int8")


def test_what_was_written_can_be_measured_and_predicts(
    probes: ProbeSet, device: DeviceProfile
) -> None:
    measured = measure_probes(probes, device=device, name="here", command="typed", rounds=5)
    assert [cost.piece.kind for cost in measured.costs] == [
        "image-stem",
        *("image-last", "image-block") * 2,
    ]
    tower = SIZE.tower(4)
    for precision in measured.precisions:
        assert Predictor(measured).predict(tower, precision).ms > 0


def test_the_same_seed_writes_the_same_set(device: DeviceProfile, tmp_path: Path) -> None:
    folders = [
        write_probes(tmp_path / name, device=device, command="typed", plan=STEM, seed=seed).path
        for name, seed in (("one", 3), ("two", 3), ("other", 4))
    ]
    name = "stem-image-32px-p16-w256-fp32.onnx"
    graphs = [(folder / name).read_bytes() for folder in folders]
    weights = [(folder / WEIGHTS_NAME).read_bytes() for folder in folders]
    assert graphs[0] == graphs[1]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    "tower",
    [
        ConvTower(widths=(16,), depths=(0,), image_size=32, dim=16),
        ConvTower(widths=(16, 24), depths=(1, 2), image_size=32, dim=16),
        TransformerTower(
            part="text", width=64, heads=1, hidden=256, layers=2, tokens=7, dim=16, gelu=True
        ),
    ],
    ids=["stage without blocks", "ConvNeXt", "text"],
)
def test_random_towers_are_exported_as_they_are_described(
    tower: ConvTower | TransformerTower, device: DeviceProfile, tmp_path: Path
) -> None:
    path = tmp_path / "tower.onnx"
    dual = random_dual(tower)
    export_tower(dual, tower.part, path, GraphForm.for_device(device))
    assert dual.spec.dim == 16
    (given,) = onnx.load(path).graph.input
    value = example(tower, device, np.random.default_rng(0))
    (found,) = open_engine(path, device=device).run({given.name: value}).values()
    assert found.shape == (1, 16)


def test_a_random_tower_has_the_sizes_of_the_plan() -> None:
    tower = ImageProbeSize(width=128, image_size=64, patch=16).tower(3)
    config = random_dual(tower).model.config.vision_config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (128, 3, 512)
    assert (config.num_attention_heads, config.image_size, config.patch_size) == (2, 64, 16)
    assert tower.tokens == 17
    second = ConvTower(widths=(16,), depths=(2,), image_size=32, dim=16, grn=True)
    assert random_dual(second).model.config.vision_config.model_type == "convnextv2"


OTHERS = ProbePlan(
    images=(),
    texts=(TextProbeSize(width=64, lengths=(8,), few=8),),
    convs=(ConvProbeSize(width=8, side=4, next=16, few=True),),
)


@pytest.mark.parametrize("plan", [*PLANS.values(), OTHERS])
def test_every_probe_comes_after_the_one_that_it_is_compared_with(plan: ProbePlan) -> None:
    seen: dict[str, bool] = {}
    for probe in plan.probes():
        assert probe.name not in seen
        if probe.beyond is not None:
            assert seen[probe.beyond] >= probe.few  # of the few, if this one is
        seen[probe.name] = probe.few
    assert not {check.name for check in plan.check_towers()} & set(seen)


def test_the_few_are_few_and_of_every_kind() -> None:
    probes = list(STANDARD.probes())
    assert sum(probe.few for probe in probes) < len(probes) / 4
    kinds = {probe.piece.kind for probe in probes}
    assert {probe.piece.kind for probe in probes if probe.few} == kinds


def test_devices_without_onnx_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not ONNX graphs"):
        write_probes(tmp_path / "set", device=load_device("jetson-orin-nano"), command="typed")


def test_the_command_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PLANS, "small", STEM)
    parser = argparse.ArgumentParser()
    probes_command.add_arguments(parser)
    out = tmp_path / "set"
    words = ["--out", str(out), "--plan", "small"]
    typed = argparse.Namespace(command=shlex.join(["edgeclip", "probes", *words]))
    assert probes_command.run(parser.parse_args(words, typed)) == 0
    printed = capsys.readouterr().out
    assert "1 probes and 0 whole towers" in printed
    assert "edgeclip measure-probes set --out measured.json" in printed
    assert ProbeSet.open(out).index.command.startswith("edgeclip probes --out")
