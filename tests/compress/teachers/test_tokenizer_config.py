import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from edgeclip.compress.teachers.dual_encoder import DualEncoder, write_portable_config


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "tokenizer_config.json").read_text())
    return found


def test_a_saved_tokenizer_is_one_that_older_releases_know(teacher_folder: Path) -> None:
    config = config_of(teacher_folder)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_prefix_space"] is True
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
    assert config_of(tmp_path) == {"tokenizer_class": "PreTrainedTokenizerFast"}
