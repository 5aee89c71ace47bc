import copy
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.bundle.build_bundle import BuiltBundle, build_bundle, check_mixed_precisions
from edgeclip.export.bundle.bundle_plan import BundlePlan
from edgeclip.export.bundle.precision_candidates import evaluate_candidates
from edgeclip.export.errors import GateError
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, Bounds, data_record
from edgeclip.export.gates.select_precision import SelectedPrecision
from edgeclip.export.graph.embedders import torch_embedder
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.config import (
    config_from_data,
    default_config,
    describe,
    needs_vnni,
)
from edgeclip.export.quantizing.fp16 import write_fp16
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.cli.verify import replay_golden
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError, InputError, SpaceMismatchError
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.spec import Tower
from tests.export.conftest import tiny_clip

pytestmark = pytest.mark.slow

Make = Callable[..., Source]
IMPOSSIBLE = Bounds(mean_cosine=1.1, p1_cosine=0.5, r1_loss=25)


def paths_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_bundle_holds_what_the_design_lists(built: BuiltBundle) -> None:
    files = {path for path in paths_in(built.bundle.path) if "." in path}
    towers = {
        f"onnx/{stem}{suffix}.onnx"
        for stem in ("vision_device", "text_model")
        for suffix in ("", "_fp16", "_int8")
    } | {"onnx/vision_model.onnx"}  # the customary form, which other software reads
    settings = {"config.json", "preprocessor_config.json", "tokenizer.json"}
    assert files == towers | settings | {"edgeclip.json", "golden.npz", "tokenizer_config.json"} | {
        "labels/letters.npz"
    }
    assert {file.path for file in built.bundle.manifest.files} == files - {"edgeclip.json"}
    assert json.loads((built.bundle.path / "config.json").read_text())["model_type"] == "clip"


def test_the_manifest_records_gates_choices_and_origin(
    built: BuiltBundle, plan: BundlePlan
) -> None:
    manifest = built.bundle.manifest
    assert (manifest.space, manifest.spec) == (plan.space, plan.student.spec)
    assert manifest.provenance.command == "pytest"
    for tower in manifest.towers:
        assert tower.precisions == ("fp32", "fp16", "int8")
        for file in tower.files:
            names = [gate.name for gate in file.gates]
            cosine = "least cosine" if file.precision == "fp32" else "1st-percentile cosine"
            assert names[:3] == ["usable embeddings", "mean cosine", cosine]
            chosen = dict.fromkeys(("image", "text"), "fp32") | {tower.tower: file.precision}
            beside = f"R@1 loss {chosen['image']} images, {chosen['text']} texts"
            assert names[3:] == ["told apart" if file.precision == "fp32" else beside]
            assert {gate.data for gate in file.gates} == {data_record(plan.test)}
            assert file.latency_ms is not None
            assert file.latency_ms > 0
    assert {"R@1 loss fp16", "R@1 loss int8"} <= {gate.name for gate in manifest.gates}
    outcomes = {gate.outcome for _, gate in manifest.all_gates()}
    assert outcomes == {"passed", "undecided"}  # 40 pairs decide nothing of a population
    assert manifest.measured_on.endswith("onnxruntime-cpu")
    assert built.left_out == ()


def test_a_collapsed_tower_ships_in_no_bundle(fp32_plan: BundlePlan, tmp_path: Path) -> None:
    """Its graph does what torch does, so that parity alone would pass it."""
    student = copy.deepcopy(fp32_plan.student)
    text_model: Any = student.model.text_model
    with torch.no_grad():  # every text is the bias of the last norm
        text_model.final_layer_norm.weight.zero_()
    with pytest.raises(GateError, match=r"text fp32: told apart is 0 .*do not belong together"):
        build_bundle(replace(fp32_plan, student=student, labels={}), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_what_could_not_be_judged_is_on_record(built: BuiltBundle) -> None:
    *remarks, noise = map(str, built.bundle.manifest.remarks)
    assert remarks == [
        "image fp16: zero-shot top-1 loss: not judged: no labels",
        "image int8: zero-shot top-1 loss: not judged: no labels",
    ]
    assert "so a loss of 25 points cannot show" in noise  # the student is not trained


def test_labels_that_captions_name_are_judged(plan: BundlePlan, tmp_path: Path) -> None:
    embeddings = np.eye(3, 16, dtype=np.float32)
    colours = LabelSet(names=("red", "teal", "pink"), embeddings=embeddings, space=plan.space)
    asked = replace(plan, precisions=("fp16",), workload=None, labels={"colours": colours})
    manifest = build_bundle(asked, tmp_path / "bundle").bundle.manifest
    gate = manifest.tower("image").file("fp16").gates[3]
    assert (gate.name, gate.passed) == ("zero-shot top-1 loss", True)
    assert gate.data is not None
    assert gate.data.name == f"{gate.data.count} labelled of 40 blobs"
    assert 5 < gate.data.count < 40
    assert [remark.subject for remark in manifest.remarks] == ["bundle"]
    texts = [gate.name for gate in manifest.tower("text").file("fp16").gates]
    assert "zero-shot top-1 loss" not in texts


def test_a_bundle_without_the_text_tower_classifies(
    plan: BundlePlan, cpu_device: DeviceProfile, blobs: Make, tmp_path: Path
) -> None:
    asked = replace(plan, precisions=("int8",), label_head="letters", text_tower=False)
    built = build_bundle(asked, tmp_path / "bundle")
    bundle = built.bundle
    assert {path for path in paths_in(bundle.path) if "." in path} == {
        *("config.json", "preprocessor_config.json", "edgeclip.json", "golden.npz"),
        *("labels/letters.npz", "onnx/vision_device.onnx", "onnx/vision_device_int8.onnx"),
        "onnx/vision_model.onnx",
    }
    assert [choice.tower for choice in built.selected] == ["image"]
    assert bundle.manifest.gates == ()  # there are no two towers to be judged together
    names = [gate.name for gate in bundle.manifest.tower("image").file("int8").gates]
    assert "R@1 loss int8 images, fp32 texts" in names
    assert {item.tower for item in replay_golden(bundle, cpu_device)} == {"image"}
    encoder = Encoder(bundle, cpu_device)
    image = blobs(1)[0].image
    ((best, _),) = encoder.classify(image, bundle.labels("letters"))
    (by_head,) = encoder.classify_by_head(image)
    assert best.label == by_head.label
    with pytest.raises(InputError, match="has no text tower"):
        encoder.encode_text("red")


def test_the_encoder_embeds_as_torch_does(
    built: BuiltBundle, clip: DualEncoder, cpu_device: DeviceProfile, blobs: Make
) -> None:
    encoder = Encoder.open(built.bundle.path, device=cpu_device, precision="fp32")
    source = blobs(5, seed=9)
    images = [source[index].image for index in range(5)]
    texts = [str(source.caption(index)) for index in range(5)]
    pixels = crop_batch(images, clip.image_spec)
    expected = torch_embedder(clip, "image")(pixels)
    np.testing.assert_allclose(encoder.encode_image(images), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_image(images, batch_size=1), expected, atol=1e-5)
    expected = torch_embedder(clip, "text")(clip.text_tokenizer.encode(texts))
    np.testing.assert_allclose(encoder.encode_text(texts), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_text(texts, batch_size=1), expected, atol=1e-5)


def test_the_bundle_replays_its_golden_inputs(
    built: BuiltBundle, cpu_device: DeviceProfile
) -> None:
    replays = replay_golden(built.bundle, cpu_device)
    assert len(replays) == 6
    assert all(replay.passed for replay in replays)


def test_a_precision_that_was_asked_for_and_misses_is_refused(
    plan: BundlePlan, tmp_path: Path
) -> None:
    bounds = {**DEFAULT_BOUNDS, "int8": IMPOSSIBLE}
    asked = replace(plan, precisions=("int8",), bounds=bounds)
    with pytest.raises(GateError) as caught:
        build_bundle(asked, tmp_path / "bundle")
    for tower in ("image", "text"):
        assert f"{tower} int8: mean cosine is 0.9" in str(caught.value)
    assert "missed by 0.1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_nobody_asked_for_is_left_out(plan: BundlePlan, tmp_path: Path) -> None:
    bounds = {**DEFAULT_BOUNDS, "int8": IMPOSSIBLE}
    built = build_bundle(replace(plan, bounds=bounds, workload=None), tmp_path / "bundle")
    assert [tower.precisions for tower in built.bundle.manifest.towers] == [("fp32", "fp16")] * 2
    assert not (tmp_path / "bundle" / "onnx" / "vision_model_int8.onnx").exists()
    assert len(built.left_out) == 2
    # Nothing was measured, so nothing but the reference is chosen.
    assert [choice.precision for choice in built.selected] == ["fp32", "fp32"]
    assert built.bundle.manifest.measured_on == ""


def test_a_graph_that_is_not_the_student_is_never_written(
    fp32_plan: BundlePlan, tmp_path: Path
) -> None:
    bounds = {**DEFAULT_BOUNDS, "fp32": IMPOSSIBLE}
    with pytest.raises(GateError, match="image fp32: mean cosine is 1 "):
        build_bundle(replace(fp32_plan, bounds=bounds), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_if_asked(
    built: BuiltBundle, fp32_plan: BundlePlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="edgeclip.export")
    out = shutil.copytree(built.bundle.path, tmp_path / "bundle")
    with pytest.raises(InputError, match="exists"):
        build_bundle(fp32_plan, out)
    assert caplog.messages == []  # found out before any work was done
    again = build_bundle(fp32_plan, out, replace=True)
    assert again.bundle.manifest.tower("image").precisions == ("fp32",)
    assert caplog.messages[0] == "exporting both towers to ONNX ..."


def test_labels_travel_with_the_bundle(built: BuiltBundle) -> None:
    assert built.bundle.label_names == ("letters",)
    assert built.bundle.labels("letters").names == ("a", "b")


def test_labels_of_another_space_are_refused(plan: BundlePlan) -> None:
    with pytest.raises(SpaceMismatchError, match="label set"):
        replace(plan, labels={"letters": replace(plan.labels["letters"], space="8" * 64)})


def test_a_plan_that_cannot_work_is_refused_at_once(
    plan: BundlePlan, blobs: Make, cpu_device: DeviceProfile
) -> None:
    with pytest.raises(ConfigError, match="pictures with captions"):
        replace(plan, test=blobs(5, has_captions=False))
    with pytest.raises(ConfigError, match="pictures with captions"):
        replace(plan, calibration=blobs(0))
    narrow = replace(cpu_device, precisions=("fp32",))
    with pytest.raises(ConfigError, match="does not allow int8, fp16: choose from fp32"):
        replace(plan, device=narrow, precisions=("int8", "fp16"))


def test_a_device_that_cannot_run_here_is_judged_on_the_cpu(plan: BundlePlan) -> None:
    gpu = DeviceProfile(
        name="gpu",
        description="elsewhere",
        engine="tensorrt",
        precisions=("fp16",),
        threads=1,
        memory_mb=8000,
        compute_capability="8.7",
        tensorrt_major=10,
    )
    other = replace(plan, device=gpu)
    assert other.judging_device.engine == "onnxruntime-cpu"
    assert other.wanted == ("fp32", "fp16")
    assert plan.judging_device is plan.device


def test_fp16_is_judged_as_a_gpu_rounds_it(
    plan: BundlePlan, clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path
) -> None:
    towers: tuple[Tower, ...] = ("image", "text")
    graphs = [clip_towers.graph(tower) for tower in towers]
    for graph in graphs[:2]:
        path = tmp_path / f"{graph.tower}_fp16.onnx"
        write_fp16(graph.path, path)
        graphs.append(replace(graph, precision="fp16", path=path))
    gpu = load_device("jetson-orin-nano")
    gpu = replace(gpu, batch_min=1, batch_best=8, batch_max=32)
    made = evaluate_candidates(replace(plan, device=gpu), graphs, {}).embeddings["image", "fp16"]
    plain = evaluate_candidates(plan, graphs, {}).embeddings["image", "fp16"]
    assert 0 < np.abs(made - plain).max() < 0.01


def test_a_mixed_choice_that_fails_together_falls_back(plan: BundlePlan) -> None:
    draw = np.random.default_rng(0).normal(size=(len(plan.test), 16)).astype(np.float32)
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    choices = (
        SelectedPrecision(tower="image", precision="int8", why="fast"),
        SelectedPrecision(tower="text", precision="fp32", why="fast"),
    )
    good = {("image", "fp32"): draw, ("text", "fp32"): draw, ("image", "int8"): draw}
    kept, judged = check_mixed_precisions(choices, good, plan)  # type: ignore[arg-type]
    assert kept == choices
    assert [item.record.name for item in judged] == ["R@1 loss int8 images, fp32 texts"]
    bad = {**good, ("image", "int8"): draw[::-1]}
    fallen, judged = check_mixed_precisions(choices, bad, plan)  # type: ignore[arg-type]
    assert [choice.precision for choice in fallen] == ["fp32", "fp32"]
    assert "points R@1" in fallen[0].why
    assert [item.record.passed for item in judged] == [False]


_WRITER = """
import sys, time
from pathlib import Path
import edgeclip.export.bundle.build_bundle as module
from edgeclip.runtime.bundle.files import atomic_directory

original = module.write_bundle

def slow(*args, **settings):
    original(*args, **settings)
    print("almost", flush=True)
    time.sleep(60)

module.write_bundle = slow
from edgeclip.runtime.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_kill_in_the_middle_of_writing_leaves_no_bundle(
    pair_folder: Path, tmp_path: Path
) -> None:
    tiny_clip(layers=1).save(tmp_path / "student")  # soon exported; and nothing is timed for it
    student = str(tmp_path / "student")
    command = ["export", student, "--teacher", student, "--data", str(pair_folder)]
    command += ["--precisions", "fp32", "--device", "web", "--accept-undecided"]
    command += ["--out", str(tmp_path / "out" / "bundle")]
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, *command], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "almost\n"
        process.send_signal(signal.SIGKILL)
    lock, left = sorted((tmp_path / "out").iterdir())
    assert lock.name.startswith(".edgeclip-lock.")  # which nobody holds
    assert left.name.startswith(".edgeclip-tmp-")
    assert (left / "edgeclip.json").exists()  # all was there but the name
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]
    assert Bundle.open(tmp_path / "out" / "bundle").manifest.name == "bundle"
    manifest = (tmp_path / "out" / "bundle" / "edgeclip.json").read_text(encoding="utf-8")
    assert "--out bundle" in manifest
    for folder in (tmp_path, pair_folder.parent):
        assert str(folder) not in manifest  # which others will read


def test_the_manifest_says_what_int8_needs(built: BuiltBundle, cpu_device: DeviceProfile) -> None:
    # Made for a CPU without int8 dot products: weights of 7 bits, which run anywhere.
    assert not cpu_device.vnni
    files = [file for item in built.bundle.manifest.towers for file in item.files]
    assert not any(file.needs_vnni for file in files)
    assert needs_vnni(default_config("int8", load_device("x86-avx512-vnni")))
    assert not needs_vnni(default_config("int8", load_device("jetson-orin-nano")))


def test_patch_features_and_label_head_come_out_of_the_encoder(
    fp32_plan: BundlePlan, cpu_device: DeviceProfile, blobs: Make, tmp_path: Path
) -> None:
    plan = replace(fp32_plan, label_head="letters", patch_features=True, workload=None)
    bundle = build_bundle(plan, tmp_path / "bundle").bundle
    encoder = Encoder(bundle, cpu_device)
    images = [blobs(5, seed=9)[index].image for index in range(5)]
    labels = bundle.labels("letters")
    best = encoder.classify_by_head(images, batch_size=2)
    for answer, (expected,) in zip(best, encoder.classify(images, labels, top=1), strict=True):
        assert answer.label == expected.label
        assert answer.score == pytest.approx(expected.score, abs=1e-5)
    assert encoder.classify_by_head([]) == []
    patches = encoder.encode_patches(images, batch_size=2)
    assert patches.shape == (5, 4, 4, 32)
    np.testing.assert_allclose(encoder.encode_patches(images[3])[0], patches[3], atol=1e-5)
    with pytest.raises(InputError, match="give at least one"):
        encoder.encode_patches([])


def test_what_was_not_exported_cannot_be_had(
    built: BuiltBundle, cpu_device: DeviceProfile, blobs: Make
) -> None:
    encoder = Encoder(built.bundle, cpu_device)
    with pytest.raises(InputError, match="export it with --patch-features"):
        encoder.encode_patches(blobs(1)[0].image)
    with pytest.raises(InputError, match="export it with --label-head"):
        encoder.classify_by_head(blobs(1)[0].image)


def test_rewrites_are_tried_where_this_machine_is_the_device(built: BuiltBundle) -> None:
    tried = {(tower, outcome.name) for tower, outcome in built.tried_passes}
    assert ("image", "fuse attention") in tried
    assert ("text", "merge projections") in tried
    assert ("text", "fuse attention") not in tried  # other runtimes read that file too
    model = onnx.load(built.bundle.tower_path("text", "fp32"), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}


def test_the_manifest_says_how_each_file_was_made(built: BuiltBundle, plan: BundlePlan) -> None:
    manifest = built.bundle.manifest
    recipes = dict(manifest.recipes())
    assert set(recipes) == {"image fp16", "image int8", "text fp16", "text int8"}
    for tower in manifest.towers:
        assert tower.file("fp32").recipe is None
        for precision in ("fp16", "int8"):
            recipe = recipes[f"{tower.tower} {precision}"]
            config = default_config(precision, plan.device)
            assert config_from_data(recipe.config, source="manifest") == config
            assert recipe.says == describe(config)
