"""What a directory holds, and what a user is told who gives another."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import FAMILIES, Teacher
from tests.runtime.fake_hub import FakeHub, files_of, serve_to

pytestmark = pytest.mark.slow

Change = Callable[[Path], object]


@pytest.fixture
def own_folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher's directory that a test may alter, as others would have saved it."""
    folder = shutil.copytree(teacher_folder, tmp_path / "own")
    (folder / "edgeclip-model.json").unlink()
    return folder


def _to_bin(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _to_shards(folder: Path) -> list[str]:
    """Two files with an index, as large models have them."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "model.safetensors").unlink()
    return sorted(set(index.values()))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine, for what does not name one."""
    with serve_to(monkeypatch, tmp_path) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        path = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + path)
        yield running


def test_a_hub_repository_of_bin_files_only(
    own_folder: Path, teacher: DualEncoder, hub: FakeHub
) -> None:
    _to_bin(own_folder)
    hub.add("someone/bins", files_of(own_folder))
    assert space_fingerprint(DualEncoder.load("someone/bins")) == space_fingerprint(teacher)
    assert "pytorch_model.bin" in hub.downloads()


def test_weights_are_fetched_once_from_a_hub_that_has_both(own_folder: Path, hub: FakeHub) -> None:
    weights = load_file(own_folder / "model.safetensors")
    torch.save(weights, own_folder / "pytorch_model.bin")
    hub.add("someone/both", files_of(own_folder))
    DualEncoder.load("someone/both")
    assert "model.safetensors" in hub.downloads()
    assert "pytorch_model.bin" not in hub.downloads()


def test_a_model_within_a_hub_repository_is_named(own_folder: Path, hub: FakeHub) -> None:
    _sentence_transformers(own_folder)
    hub.add("someone/sentences", files_of(own_folder))
    with pytest.raises(ConfigError, match="DIR/0_CLIPModel after `hf download someone/sentences"):
        DualEncoder.load("someone/sentences")


@pytest.mark.parametrize("name", ["open_clip", "sentence_transformers"])
def test_other_layouts_come_from_the_hub(name: str, tmp_path: Path, hub: FakeHub) -> None:
    made = FAMILIES[name](tmp_path / "made" / name) if name != "open_clip" else _open_clip(tmp_path)
    hub.add("someone/other", files_of(made.folder))
    found = DualEncoder.load("someone/other")
    assert found.space == DualEncoder.load(made.folder).space


def _open_clip(folder: Path) -> Teacher:
    """With weights of torch only."""
    (folder / "made").mkdir()
    made = FAMILIES["open_clip"](folder / "made" / "open_clip")
    path = made.folder / "open_clip_model.safetensors"
    torch.save(load_file(path), made.folder / "open_clip_pytorch_model.bin")
    path.unlink()
    return made


def test_a_revision_is_pinned(own_folder: Path, teacher: DualEncoder, hub: FakeHub) -> None:
    hub.add("someone/moving", files_of(own_folder))
    (commit,) = hub.repos["someone/moving"].commits
    later = files_of(own_folder)
    later["config.json"] = b"{}"
    hub.repos["someone/moving"].commit("main", later)
    assert space_fingerprint(DualEncoder.load(f"someone/moving@{commit}")) == teacher.space
    with pytest.raises(ConfigError, match="no model_type"):
        DualEncoder.load("someone/moving")


@pytest.mark.parametrize("form", [_to_bin, _to_shards])
def test_other_files_of_the_same_weights(
    own_folder: Path, teacher: DualEncoder, form: Change
) -> None:
    form(own_folder)
    assert space_fingerprint(DualEncoder.load(own_folder)) == space_fingerprint(teacher)


class _Program:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_a_program_among_the_weights_is_not_run(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights = load_file(own_folder / "model.safetensors")
    torch.save({**weights, "more": _Program()}, own_folder / "pytorch_model.bin")
    (own_folder / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="save them as safetensors"):
        DualEncoder.load(own_folder)
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_named(own_folder: Path) -> None:
    shards = _to_shards(own_folder)
    (own_folder / shards[1]).unlink()
    with pytest.raises(ConfigError, match=rf"lacks 1 of the 2 files .* such as {shards[1]}"):
        DualEncoder.load(own_folder)


def _only(*names: str) -> Change:
    """Leave nothing but some empty files."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")

    return change


def _sentence_transformers(folder: Path) -> None:
    shutil.move(folder, folder.with_name("0_CLIPModel"))
    folder.mkdir()
    shutil.move(folder.with_name("0_CLIPModel"), folder)
    (folder / "modules.json").write_text("[]")


def _sentence_bert(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "modules.json").write_text("[]")


def _checkpoint_within(folder: Path) -> None:
    shutil.move(folder, folder.with_name("checkpoint-500"))
    folder.mkdir()
    shutil.move(folder.with_name("checkpoint-500"), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_only("open_clip_config.json", "open_clip_model.safetensors"), "has no model_cfg"),
        (_only("open_clip_pytorch_model.bin"), "OpenCLIP checkpoint without its open_clip_config"),
        (_only("modules.json", "model.safetensors"), "sentence-transformers model without a CLIP"),
        (_sentence_bert, "sentence-transformers model without a CLIP"),
        (_sentence_transformers, "sentence-transformers model: give the CLIP in it, .*0_CLIPModel"),
        (_checkpoint_within, "no config.json, but a model lies in a subfolder: .*checkpoint-500"),
        (_only("model_index.json"), "a diffusers pipeline"),
        (_only("onnx.txt", "model.onnx"), r"no config.json, but model\.onnx"),
        (_only("ViT-B-32.pt"), "architecture is unknown"),
        (_only("model.safetensors"), "architecture is unknown"),
        (_only("readme.txt"), "no config.json, so it is no Hugging Face model"),
        (
            lambda folder: (folder / "config.json").write_text('{"architecture": "vit"}'),
            "a timm model",
        ),
        (lambda folder: (folder / "config.json").write_text("{}"), "no model_type in config.json"),
        (
            lambda folder: shutil.move(folder / "model.safetensors", folder / "clip.safetensors"),
            "has no weights: .* it holds clip.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\nsize 7\n"
            ),
            "git lfs pull",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is empty"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no vocabulary: no file of it"),
        (
            lambda folder: shutil.move(folder / "tokenizer.json", folder / "vocab.json"),
            "vocab.json alone is not enough",
        ),
    ],
)
def test_what_is_no_model_is_named(own_folder: Path, change: Change, message: str) -> None:
    change(own_folder)
    with pytest.raises(ConfigError, match=message) as caught:
        DualEncoder.load(own_folder)
    assert "\n" not in str(caught.value)
    assert str(own_folder) in str(caught.value)


def test_a_file_is_no_directory(own_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors is a file: give the directory"):
        DualEncoder.load(own_folder / "model.safetensors")


@pytest.mark.parametrize(
    ("prefix", "suffix", "message"),
    [
        ("base_model.model.", "", "LoRA adapter: merge it with peft"),
        ("module.", "", "DDP"),
        ("_orig_mod.", "", "torch.compile"),
        ("", ".lora_A.default.weight", "LoRA adapter: merge it with peft"),
    ],
)
def test_names_of_a_wrapper(own_folder: Path, prefix: str, suffix: str, message: str) -> None:
    path = own_folder / "model.safetensors"
    weights = load_file(path)
    renamed = {f"{prefix}{name}{suffix}": value for name, value in weights.items()}
    save_file(renamed, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        DualEncoder.load(own_folder)
