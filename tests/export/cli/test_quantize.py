import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle import bundle_plan
from edgeclip.export.graph import tune_passes
from edgeclip.export.graph.graph_io import load_graph, sha256_graph
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.export.graph.to_onnx import GraphForm, TowerPaths, export_tower
from edgeclip.export.quantizing import candidate_evaluator, search_task
from edgeclip.export.quantizing.config import (
    Config,
    Float16,
    Float32,
    StaticInt8,
    config_from_data,
    default_config,
    key,
)
from edgeclip.export.quantizing.quantization_file import (
    Quantization,
    SearchBasis,
    TowerQuantization,
    apply_passes,
    apply_searched,
    export_searched,
)
from edgeclip.export.quantizing.quantize_graph import quantize_graph
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import ConfigError
from tests.export.conftest import LOOSE

pytestmark = pytest.mark.slow

BASIS = SearchBasis(device="test-cpu", machine=None, pairs=9, ranges=3, calibration="2" * 64)


def run(*words: object) -> int:
    return main(["quantize", *map(str, words)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pictures with captions: 24 to calibrate on and 8 to test."""
    from tests.export.conftest import Blobs

    for seed, (split, count) in enumerate((("test", 8), ("calibration", 24))):
        folder = tmp_path / "pairs" / split
        folder.mkdir(parents=True)
        source = Blobs(count, seed)
        for index in range(count):
            source[index].image.save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(str(source.caption(index)))
    return tmp_path / "pairs"


def test_a_student_outside_its_teachers_space_is_warned_of_before_the_search(
    clip: DualEncoder, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "teacher")
    other = DualEncoder(
        copy.deepcopy(clip.model), clip.image_spec, clip.tokenizer, space=clip.space
    )
    with torch.no_grad():
        other.model.get_parameter("visual_projection.weight").neg_()
    other.save(tmp_path / "student")
    words = [tmp_path / "student", "--teacher", tmp_path / "teacher", "--data", pairs]
    words += ["--device", "rtx-4000-ada", "--minutes", 0.01]
    assert run(*words, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().err
    warned = told.index("`edgeclip export` will refuse it")
    assert "image fp32: mean cosine to the teacher is -" in told[warned:]
    assert warned < told.index("exporting the image tower")


def test_a_tower_is_searched_and_the_choice_written(
    clip: DualEncoder, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "student")
    student, out, page = tmp_path / "student", tmp_path / "out", tmp_path / "page.html"
    words = [student, "--teacher", student, "--data", pairs, "--device", "rtx-4000-ada"]
    assert run(*words, "--out", out, "--page", page) == 0
    printed = capsys.readouterr()
    assert "mean cosine" in printed.out
    assert "chosen: " in printed.out
    assert f"next: edgeclip export {student} --quantization {out}/quantization.json" in printed.out
    chosen = Quantization.load(out / "quantization.json")
    assert chosen.basis.device == "rtx-4000-ada"
    assert set(chosen.towers) == {"image"}
    graph = next((out / "image" / "onnx").glob("*.onnx"))
    assert chosen.towers["image"].graph == sha256_graph(graph)
    assert "<html" in page.read_text(encoding="utf-8")

    # The other tower joins it, and a rerun measures nothing again.
    assert run(*words, "--out", out, "--tower", "text") == 0
    both = Quantization.load(out / "quantization.json")
    assert set(both.towers) == {"image", "text"}
    assert both.towers["image"] == chosen.towers["image"]
    before = {path: path.stat().st_mtime_ns for path in (out / "image").glob("quantizationc*.json")}
    assert run(*words, "--out", out) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "image").glob("quantizationc*.json")}
    assert after == before
    capsys.readouterr()
    assert run(*words[:-1], "x86-avx2", "--out", out) == 2
    assert "is for rtx-4000-ada" in capsys.readouterr().err


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What the search makes, by the key of its config; nothing is changed."""
    made: dict[str, bytes] = {}

    def remembering(source: Path, target: Path, config: Config, *rest: Any, **more: Any) -> None:
        quantize_graph(source, target, config, *rest, **more)
        made[key(config)] = target.read_bytes()

    monkeypatch.setattr(candidate_evaluator, "quantize_graph", remembering)
    return made


def test_a_bundle_ships_the_very_file_that_the_search_judged(
    clip: DualEncoder,
    pairs: Path,
    judged: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (search_task, bundle_plan):  # eight pairs decide nothing
        monkeypatch.setattr(module, "DEFAULT_BOUNDS", LOOSE)
    clip.save(tmp_path / "student")
    student, found = str(tmp_path / "student"), tmp_path / "out"
    words = ["--teacher", student, "--data", str(pairs), "--device", "x86-avx2"]
    words += ["--accept-undecided"]
    assert run(student, *words, "--out", found, "--minutes", "1") == 0
    (chosen,) = Quantization.load(found / "quantization.json").towers.values()
    export = ["export", student, "--quantization", str(found / "quantization.json")]
    bundle, printed = tmp_path / "bundle", capsys.readouterr().out
    assert f"edgeclip {' '.join([*export, *words])} --out bundle" in printed
    assert main([*export, *words, "--out", str(bundle)]) == 0
    manifest = Bundle.open(bundle).manifest
    file = manifest.tower("image").file("int8")
    assert (bundle / file.path).read_bytes() == judged[key(chosen.config)]
    assert file.recipe is not None
    assert config_from_data(file.recipe.config, source="manifest") == chosen.config
    capsys.readouterr()
    assert main(["verify", str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert "how each was made:\nimage int8: " in printed

    # Whatever else is named, nothing is written.
    for more, says in (
        (["--device", "x86-avx512-vnni"], "is for the device 'x86-avx2'"),
        (["--calibration-count", "5"], "leave out --calibration-count"),
        (["--quantization", "none.json"], "cannot read none.json"),
        (["--qat-steps", "5"], "it needs train as well"),
    ):
        assert main([*export, *words, *more, "--out", str(tmp_path / "other")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_pairs_without_captions_and_too_few_are_refused(
    clip: DualEncoder, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip.save(tmp_path / "student")
    words = [tmp_path / "student", "--teacher", tmp_path / "student", "--out", tmp_path / "out"]
    for path in list((pairs / "calibration").iterdir())[10:]:
        path.unlink()
    for picture in (pairs / "calibration").glob("*.txt"):
        if not picture.with_suffix(".png").exists():
            picture.unlink()
    for picture in (pairs / "calibration").glob("*.png"):
        if not picture.with_suffix(".txt").exists():
            picture.unlink()
    assert run(*words, "--data", pairs) == 2
    assert "give at least 16" in capsys.readouterr().err
    for path in pairs.rglob("*.txt"):
        path.unlink()
    assert run(*words, "--data", pairs) == 2
    assert "captions" in capsys.readouterr().err


def test_the_file_comes_back_as_it_was(tmp_path: Path) -> None:
    image = TowerQuantization(
        config=StaticInt8(symmetric=False, kept=("a", "b"), smoothing=(("norm", 0.5),)),
        graph="0" * 64,
        passes=("merge projections",),
        why="fastest inside its gates",
    )
    text = TowerQuantization(config=Float16(), graph="1" * 64, passes=(), why="so")
    whole = Quantization(basis=BASIS, towers={"image": image, "text": text})
    whole.save(tmp_path / "q.json")
    assert Quantization.load(tmp_path / "q.json") == whole


def test_export_takes_what_was_chosen_and_the_defaults_elsewhere(cpu_device: DeviceProfile) -> None:
    chosen = StaticInt8(symmetric=False, kept=("a",))
    image = TowerQuantization(config=chosen, graph="0" * 64, passes=(), why="")
    only = Quantization(basis=BASIS, towers={"image": image})
    assert only.config_for("image", "int8", cpu_device) == chosen
    assert only.config_for("image", "fp16", cpu_device) == Float16()
    assert only.config_for("text", "int8", cpu_device) == default_config("int8", cpu_device)
    no_use = replace(only, towers={"image": replace(image, config=Float32())})
    assert no_use.config_for("image", "int8", cpu_device) is None
    assert no_use.config_for("image", "fp32", cpu_device) == Float32()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema 9 of quantization.json is not 2"),
        ({"basis": {"device": None}}, "basis.device: "),
        ({"more": 1}, "more: unknown key"),
        ({"towers": {"sound": {}}}, "'image' or 'text'"),
        ({"towers": {"image": {"config": {"kind": "int3"}}}}, "towers.image.config: "),
    ],
)
def test_a_file_that_is_not_one_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "q.json"
    Quantization(basis=BASIS, towers={}).save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Quantization.load(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        Quantization.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        Quantization.load(tmp_path / "none.json")


def test_a_second_run_starts_from_the_same_graph(
    clip: DualEncoder, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    """Whatever the clock said the first time: what was kept is written down."""
    from tests.export.conftest import Blobs

    first = export_searched(clip, "image", cpu_device, tmp_path, sample=Blobs(8))
    content = first.graph.path.read_bytes()
    note = tmp_path / "image-passes.json"
    kept = json.loads(note.read_text(encoding="utf-8"))
    kept["passes"] = ["merge projections"]
    note.write_text(json.dumps(kept), encoding="utf-8")
    again = export_searched(clip, "image", cpu_device, tmp_path, sample=Blobs(8))
    assert again.passes == ("merge projections",)
    if first.passes == again.passes:
        assert again.graph.path.read_bytes() == content
    names = {node.name for node in load_graph(again.graph.path).graph.node}
    assert any(name.endswith("_wide") for name in names)


def test_a_bundle_can_make_the_graph_that_was_tuned(
    clip: DualEncoder,
    cpu_device: DeviceProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rewrites are named, and that is enough to get the same bytes."""
    from tests.export.conftest import Blobs

    monkeypatch.setattr(tune_passes, "MAX_TIME_RATIO", 100.0)  # keep all that can be run
    tuned = export_searched(clip, "image", cpu_device, tmp_path, sample=Blobs(8))
    assert tuned.passes
    found = TowerQuantization(
        config=Float32(), graph=sha256_graph(tuned.graph.path), passes=tuned.passes, why=""
    )
    fresh = replace(tuned.graph, path=tmp_path / "fresh.onnx")
    form = GraphForm.for_device(cpu_device)
    export_tower(clip, "image", fresh.path, form)
    apply_searched(fresh, found)
    export_tower(clip, "image", fresh.path, form)
    with pytest.raises(ConfigError, match="search again"):
        apply_searched(fresh, replace(found, passes=found.passes[1:]))


def test_passes_that_are_applied_give_the_graph_that_was_tuned(
    clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path
) -> None:
    paths = [tmp_path / "one.onnx", tmp_path / "two.onnx"]
    for path in paths:
        export_tower(clip, "text", path)
        apply_passes(path, [item.name for item in PASSES])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != clip_towers.text.read_bytes()
    with pytest.raises(Exception, match="no rewrite 'magic'"):
        apply_passes(paths[0], ["magic"])
