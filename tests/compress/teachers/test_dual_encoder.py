"""Load, save and run Hugging Face dual encoders."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import (
    DualEncoder,
    read_record,
    space_fingerprint,
    write_portable_config,
)
from edgeclip.runtime.errors import ConfigError, InputError

pytestmark = pytest.mark.slow

TEXTS = ["red apple", "hot beverage left of red apple on a blue background", ""]


@pytest.fixture
def own_teacher(teacher: DualEncoder) -> DualEncoder:
    """A copy of the teacher that a test may alter."""
    return copy.deepcopy(teacher)


@pytest.fixture
def own_folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher's directory that a test may alter."""
    return shutil.copytree(teacher_folder, tmp_path / "own")


def _embeddings(model: DualEncoder) -> tuple[Tensor, Tensor]:
    source = EmojiSource("test", 6, size=40)
    pictures = [source[index].image for index in range(6)]
    with torch.inference_mode():
        image = model.embed_image(model.preprocess(pictures))
        return image, model.embed_text(model.tokenize(TEXTS))


def _recorded(folder: Path) -> str:
    record = read_record(folder)
    assert record is not None
    return record.space


def _edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_spec_says_what_the_model_takes(teacher: DualEncoder) -> None:
    spec = teacher.spec
    assert (spec.dim, spec.image.size, spec.text.context_length) == (32, 32, 40)
    assert spec.text.vocab_size == 400
    marks = (spec.text.bos_id, spec.text.eos_id, spec.text.pad_id)
    assert marks == (0, 1, 2)
    assert spec.logit_scale == pytest.approx(14.2857, rel=1e-3)  # CLIP starts at 1 / 0.07


def test_embeddings_are_unit_float32(teacher: DualEncoder) -> None:
    for embeddings, count in zip(_embeddings(teacher), (6, 3), strict=True):
        assert embeddings.shape == (count, 32)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(count))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = teacher.embed_text(teacher.tokenize(TEXTS))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=-1), torch.ones(3))


def test_text_embedding_does_not_depend_on_padding(teacher: DualEncoder) -> None:
    alone = torch.cat([teacher.embed_text(teacher.tokenize([text])) for text in TEXTS])
    together = teacher.embed_text(teacher.tokenize(TEXTS))
    ids = teacher.tokenize(TEXTS)
    pad = teacher.spec.text.pad_id
    full = torch.nn.functional.pad(ids, (0, 40 - ids.shape[1]), value=pad)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(teacher.embed_text(full), alone, atol=1e-6, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_save_and_load_in_fp32(teacher: DualEncoder, teacher_folder: Path) -> None:
    loaded = DualEncoder.load(teacher_folder)
    assert not loaded.training
    assert loaded.spec == teacher.spec
    assert space_fingerprint(loaded) == space_fingerprint(teacher)
    for ours, theirs in zip(_embeddings(loaded), _embeddings(teacher), strict=True):
        assert torch.equal(ours, theirs)


def test_save_and_load_in_fp16(teacher: DualEncoder, tmp_path: Path) -> None:
    teacher.save(tmp_path / "half", dtype=torch.float16)
    rounded = DualEncoder.load(tmp_path / "half")
    assert {value.dtype for value in rounded.state_dict().values()} == {torch.float32}
    half = (tmp_path / "half" / "model.safetensors").stat().st_size
    for ours, theirs in zip(_embeddings(rounded), _embeddings(teacher), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
    # Weights that fit into fp16 lose nothing: the same space in either format.
    rounded.save(tmp_path / "again", dtype=torch.float16)
    rounded.save(tmp_path / "whole", dtype=torch.float32)
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 1.9 * half
    spaces = {space_fingerprint(DualEncoder.load(tmp_path / name)) for name in ("again", "whole")}
    assert spaces == {space_fingerprint(rounded)}
    assert spaces != {space_fingerprint(teacher)}


def test_saving_leaves_the_live_weights_alone(own_teacher: DualEncoder, tmp_path: Path) -> None:
    before = space_fingerprint(own_teacher)
    own_teacher.save(tmp_path / "half", dtype=torch.float16)
    assert space_fingerprint(own_teacher) == before
    assert own_teacher.model.logit_scale.dtype == torch.float32


def test_transformers_load_what_was_saved(teacher: DualEncoder, teacher_folder: Path) -> None:
    model = CLIPModel.from_pretrained(teacher_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(teacher_folder)
    source = EmojiSource("test", 4, size=32)
    pictures = [source[index].image for index in range(4)]
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    ours = teacher.preprocess(pictures)
    torch.testing.assert_close(ours, theirs, atol=2 / 255 * 2, rtol=0)
    with torch.inference_mode():
        pooled = model.get_image_features(pixel_values=ours).pooler_output
        expected = teacher.embed_image(ours)
    torch.testing.assert_close(torch.nn.functional.normalize(pooled, dim=-1), expected)


def test_a_directory_of_something_else_is_not_replaced(
    teacher: DualEncoder, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("of another program", encoding="utf-8")
    with pytest.raises(InputError, match=r"holds no edgeclip-model\.json, so it is not replaced"):
        teacher.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_others_put_beside_a_model_is_kept(teacher: DualEncoder, own_folder: Path) -> None:
    (own_folder / "README.md").write_text("ours", encoding="utf-8")
    (own_folder / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model before")
    teacher.save(own_folder)
    assert (own_folder / "README.md").read_text(encoding="utf-8") == "ours"
    assert not list(own_folder.glob("model-*"))


def test_a_teacher_records_the_space_it_was_rounded_to(
    teacher: DualEncoder, tmp_path: Path
) -> None:
    assert teacher.space == space_fingerprint(teacher)
    teacher.save(tmp_path / "whole")
    assert _recorded(tmp_path / "whole") == teacher.space
    whole = DualEncoder.load(tmp_path / "whole")
    whole.save(tmp_path / "half", dtype=torch.float16)
    half = DualEncoder.load(tmp_path / "half")
    assert half.space == _recorded(tmp_path / "half") == space_fingerprint(half)
    assert half.space != teacher.space


def test_a_model_without_a_record_has_its_own_space(own_folder: Path) -> None:
    (own_folder / "edgeclip-model.json").unlink()
    loaded = DualEncoder.load(own_folder)
    assert loaded.space == space_fingerprint(loaded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 3, "space": "' + "0" * 64 + '"}', "schema_version"),
        ('{"schema_version": 2, "space": "' + "0" * 64 + '"}', "model is for schema_version 2"),
        ('{"schema_version": 1, "space": "abc"}', "64 hexadecimal digits"),
        ('{"schema_version": 1}', "space"),
        ("{", "cannot read"),
    ],
)
def test_a_damaged_record(own_folder: Path, text: str, message: str) -> None:
    path = own_folder / "edgeclip-model.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        DualEncoder.load(own_folder)
    assert str(path) in str(caught.value)


def _retrained(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.text_projection.weight.mul_(-1)
    model.save_pretrained(folder)


def _other_activation(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["text_config"]["hidden_act"] = "gelu"

    _edit(folder / "config.json", change)


def _other_mean(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["image_mean"] = [0.4, 0.5, 0.5]

    _edit(folder / "preprocessor_config.json", change)


@pytest.mark.parametrize("change", [_retrained, _other_activation, _other_mean])
@pytest.mark.parametrize("of_a_student", [False, True])
def test_a_model_that_was_changed_has_left_its_space(
    own_teacher: DualEncoder,
    tmp_path: Path,
    change: Callable[[Path], None],
    of_a_student: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "saved"
    space = "7" * 64 if of_a_student else None
    parts = (own_teacher.model, own_teacher.image_spec, own_teacher.tokenizer)
    DualEncoder(*parts, space=space).save(folder)
    before = DualEncoder.load(folder).space
    assert not caplog.records
    change(folder)
    changed = DualEncoder.load(folder)
    assert "was changed since EdgeCLIP saved it" in caplog.text
    assert changed.space != before
    changed.save(tmp_path / "again")  # says what it is now
    caplog.clear()
    assert DualEncoder.load(tmp_path / "again").space == changed.space
    assert not caplog.records


def test_saving_by_others_without_a_change_keeps_the_space(own_folder: Path) -> None:
    before = DualEncoder.load(own_folder).space
    CLIPModel.from_pretrained(own_folder).save_pretrained(own_folder)
    AutoTokenizer.from_pretrained(own_folder).save_pretrained(own_folder)
    assert DualEncoder.load(own_folder).space == before


def test_a_record_of_an_older_release_is_taken_with_a_warning(
    own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = json.dumps({"schema_version": 1, "space": "7" * 64})
    (own_folder / "edgeclip-model.json").write_text(text)
    assert DualEncoder.load(own_folder).space == "7" * 64
    assert "saved by an older EdgeCLIP" in caplog.text


@pytest.mark.parametrize(
    ("tower", "name", "value"),
    [
        ("vision_config", "num_attention_heads", 4),
        ("vision_config", "hidden_act", "relu"),
        ("text_config", "layer_norm_eps", 1e-2),
        ("text_config", "eos_token_id", 7),
    ],
)
def test_a_setting_of_a_tower_changes_the_space(
    own_teacher: DualEncoder, tower: str, name: str, value: object
) -> None:
    before = space_fingerprint(own_teacher)
    setattr(getattr(own_teacher.model.config, tower), name, value)
    assert space_fingerprint(own_teacher) != before


def test_a_processor_saved_whole(teacher: DualEncoder, own_folder: Path) -> None:
    image = CLIPImageProcessor.from_pretrained(own_folder)
    CLIPProcessor(image, teacher.tokenizer).save_pretrained(own_folder)
    (own_folder / "preprocessor_config.json").unlink()
    assert DualEncoder.load(own_folder).image_spec == teacher.image_spec
    # Without the picture's part, CLIP's defaults would be a guess.
    _edit(own_folder / "processor_config.json", lambda data: data.pop("image_processor"))
    with pytest.raises(ConfigError, match=r"processor_config\.json has no image_processor"):
        DualEncoder.load(own_folder)


def test_fingerprint_is_64_hex_digits(teacher: DualEncoder) -> None:
    assert len(bytes.fromhex(space_fingerprint(teacher))) == 32


def test_fingerprint_changes_with_any_weight(own_teacher: DualEncoder) -> None:
    before = space_fingerprint(own_teacher)
    seen = {before}
    weights = own_teacher.model.state_dict()
    temperature = weights.pop("logit_scale")  # changes no embedding
    temperature += 0.25
    assert space_fingerprint(own_teacher) == before
    for value in weights.values():
        first = value.view(-1)[0].clone()
        value.view(-1)[0] += 0.25
        seen.add(space_fingerprint(own_teacher))
        value.view(-1)[0] = first
    assert len(seen) == 1 + len(weights)
    assert space_fingerprint(own_teacher) == before


def test_fingerprint_changes_with_the_image_contract(own_teacher: DualEncoder) -> None:
    before = space_fingerprint(own_teacher)
    own_teacher.image_spec = replace(own_teacher.image_spec, mean=(0.5, 0.5, 0.4))
    assert space_fingerprint(own_teacher) != before


def test_fingerprint_changes_with_the_tokenizer(own_teacher: DualEncoder, own_folder: Path) -> None:
    def swap_merges(data: dict[str, object]) -> None:
        model = data["model"]
        assert isinstance(model, dict)
        merges = model["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]

    _edit(own_folder / "tokenizer.json", swap_merges)
    other = DualEncoder.load(own_folder)
    assert space_fingerprint(other) != space_fingerprint(own_teacher)


def test_using_the_tokenizer_changes_no_fingerprint(own_teacher: DualEncoder) -> None:
    before = space_fingerprint(own_teacher)
    own_teacher.tokenizer(TEXTS, padding=True, truncation=True, max_length=5)
    assert space_fingerprint(own_teacher) == before


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "", "{", "[]"])
def test_missing_and_damaged_files(own_folder: Path, name: str, damage: str) -> None:
    path = own_folder / name
    path.unlink() if damage == "missing" else path.write_text(damage)
    with pytest.raises(ConfigError) as caught:
        DualEncoder.load(own_folder)
    assert str(own_folder) in str(caught.value)
    assert damage == "missing" or name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_damaged_file_of_the_tokenizer_is_named(own_folder: Path, name: str) -> None:
    (own_folder / name).write_text('{"unk_token": ')
    with pytest.raises(ConfigError, match=name):
        DualEncoder.load(own_folder)


def test_a_setting_that_transformers_does_not_know(own_folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["text_config"]["hidden_act"] = "no such function"

    _edit(own_folder / "config.json", change)
    with pytest.raises(ConfigError, match=r"setting in config\.json .*no such function"):
        DualEncoder.load(own_folder)


def test_a_bundle_is_no_student(own_folder: Path) -> None:
    (own_folder / "edgeclip.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a bundle: give the model"):
        DualEncoder.load(own_folder)


def test_truncated_weights(own_folder: Path) -> None:
    path = own_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or cut short"):
        DualEncoder.load(own_folder)


@pytest.mark.parametrize(
    ("tower", "key", "value", "message"),
    [
        ("vision_config", "num_hidden_layers", 6, r"32 missing \(such as vision_model.*layers\.4"),
        ("vision_config", "num_hidden_layers", 2, r"32 unknown \(such as vision_model.*layers\.2"),
        ("vision_config", "intermediate_size", 128, r"12 of another size \(such as vision_model"),
        ("text_config", "vocab_size", 500, r"1 of another size \(such as text_model"),
    ],
)
def test_weights_that_do_not_fit_the_config(
    own_folder: Path, tower: str, key: str, value: int, message: str
) -> None:
    def change(data: dict[str, object]) -> None:
        config = data[tower]
        assert isinstance(config, dict)
        config[key] = value

    _edit(own_folder / "config.json", change)
    with pytest.raises(ConfigError, match=message) as caught:
        DualEncoder.load(own_folder)
    assert "\n" not in str(caught.value)


def test_unsupported_family(own_folder: Path) -> None:
    _edit(own_folder / "config.json", lambda data: data.update(model_type="blip"))
    with pytest.raises(ConfigError, match="'blip' is not supported; known: clip, siglip, altclip"):
        DualEncoder.load(own_folder)


def test_unsupported_preprocessing(own_folder: Path) -> None:
    path = own_folder / "preprocessor_config.json"
    _edit(path, lambda data: data.update(crop_size={"height": 32, "width": 16}))
    with pytest.raises(ConfigError, match="is not a square"):
        DualEncoder.load(own_folder)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~nobody/model"])
def test_no_such_directory(source: str) -> None:
    with pytest.raises(ConfigError, match="is not a directory with a Hugging Face dual encoder"):
        DualEncoder.load(source)


@pytest.mark.parametrize("source", ["nobody/no-such-clip", "not a hub id", "a/b/c"])
def test_hub_id_without_a_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="neither a directory here nor to be had") as caught:
        DualEncoder.load(source)
    assert str(caught.value).startswith(source)
    assert "\n" not in str(caught.value)


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "tokenizer_config.json").read_text())
    return found


def test_a_saved_tokenizer_is_one_that_older_releases_know(teacher_folder: Path) -> None:
    config = config_of(teacher_folder)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_prefix_space"] is True
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"backend", "is_local", "local_files_only"} & config.keys()


@pytest.mark.parametrize("text", ["a red apple", " a  red apple", "naïve, 3 of them!", ""])
def test_it_still_gives_the_same_ids(text: str, teacher: DualEncoder, teacher_folder: Path) -> None:
    again = AutoTokenizer.from_pretrained(teacher_folder)
    assert again(text)["input_ids"] == teacher.tokenizer(text)["input_ids"]


def test_other_classes_keep_their_name(tmp_path: Path) -> None:
    """Such as CLIPTokenizer, which every release knows."""
    given = {"tokenizer_class": "CLIPTokenizer", "is_local": False, "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    write_portable_config(tmp_path)
    assert config_of(tmp_path) == {"tokenizer_class": "CLIPTokenizer", "bos_token": "<s>"}


def test_a_tokenizer_without_a_pre_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": null}')
    write_portable_config(tmp_path)
    assert config_of(tmp_path) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
