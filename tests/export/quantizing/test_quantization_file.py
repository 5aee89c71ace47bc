"""`quantization.json`: a round trip, files of older versions, and remedies that were removed."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.quantization_file import (
    Quantization,
    SearchBasis,
    TowerQuantization,
)
from edgeclip.runtime.errors import ConfigError

CONFIG = StaticInt8(symmetric=False, kept=("node_1",), smoothing=(("norm", 0.5),))
CHOICES = Quantization(
    basis=SearchBasis(device="x", machine=None, pairs=10, ranges=5, calibration="0" * 64),
    towers={"image": TowerQuantization(config=CONFIG, graph="0" * 64, passes=(), why="fastest")},
)


def older(**change: object) -> str:
    """The same choices as an older version wrote them, with some fields changed."""
    data: dict[str, Any] = json.loads(CHOICES.to_json())
    data["towers"]["image"]["config"] |= {"equalised": False, "bias_corrected": False, **change}
    return json.dumps(data)


def test_choices_are_read_as_they_were_saved(tmp_path: Path) -> None:
    CHOICES.save(tmp_path / "quantization.json")
    assert Quantization.load(tmp_path / "quantization.json") == CHOICES


def test_a_file_of_an_older_version_is_read() -> None:
    assert Quantization.from_json(older(), source="old.json") == CHOICES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"equalised": True}, "equalised"),
        ({"bias_corrected": True}, "bias_corrected"),
        ({"ranging": {"method": "mse", "percentile": 99.99}}, "ranges by mse"),
    ],
)
def test_a_removed_remedy_says_to_search_again(change: dict[str, object], named: str) -> None:
    wanted = f"old.json: the config of the image tower uses {named}, .* search again with"
    with pytest.raises(ConfigError, match=wanted):
        Quantization.from_json(older(**change), source="old.json")


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 2, "towers": []}', '{"towers": 1}'])
def test_what_is_no_such_file_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"old\.json"):
        Quantization.from_json(text, source="old.json")
