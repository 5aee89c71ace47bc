import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.profiles.predict.tower_shapes import (
    BlockCount,
    ConvTower,
    TowerBlock,
    TransformerTower,
    image_tokens,
    read_image_tower,
)
from edgeclip.runtime.errors import ConfigError
from tests.runtime.conftest import EMOJI_BUNDLE

IMAGE = TransformerTower(
    part="image", width=128, heads=2, hidden=512, layers=4, tokens=65, dim=256, patch=8
)


def counts(parts: tuple[BlockCount, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        found[part.piece.kind] = found.get(part.piece.kind, 0) + part.count
    return found


def test_an_image_tower_is_a_stem_blocks_and_a_last_layer() -> None:
    assert counts(IMAGE.parts()) == {"image-stem": 1, "image-block": 3, "image-last": 1}
    assert IMAGE.image_size == 64
    assert IMAGE.stem() == TowerBlock(kind="image-stem", width=128, positions=64, patch=8)
    assert image_tokens(224, 14) == 257


def test_a_tower_of_one_layer_has_no_block_for_all_tokens() -> None:
    one = TransformerTower(part="text", width=64, heads=1, hidden=256, layers=1, tokens=9, dim=32)
    assert counts(one.parts()) == {"text-last": 1}


def test_stages_halve_the_resolution() -> None:
    tower = ConvTower(widths=(48, 96, 192), depths=(2, 2, 4), image_size=64, dim=256)
    assert counts(tower.parts()) == {
        "conv-stem": 1,
        "conv-block": 8,
        "conv-down": 2,
        "conv-head": 1,
    }
    assert [tower.side(stage) for stage in range(3)] == [16, 8, 4]
    assert tower.down(1) == TowerBlock(kind="conv-down", width=96, positions=64, given=48)
    assert tower.head().given == 256


@pytest.mark.parametrize(
    ("widths", "depths", "size", "message"),
    [
        ((8, 16), (1,), 64, "one number for each stage"),
        ((), (), 64, "one number for each stage"),
        ((8, 0), (1, 1), 64, "at least 1"),
        ((8, 16, 32), (1, 1, 1), 8, "8 pixels is too small"),
    ],
)
def test_stages_that_cannot_be_are_refused(
    widths: tuple[int, ...], depths: tuple[int, ...], size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ConvTower(widths=widths, depths=depths, image_size=size, dim=8)


def test_sizes_are_read_from_what_hugging_face_writes(tmp_path: Path) -> None:
    assert read_image_tower(EMOJI_BUNDLE / "config.json", image_size=64, dim=256) == IMAGE
    tower = ConvTower(widths=(32, 64), depths=(2, 1), image_size=64, dim=256)
    vision = {"model_type": "convnext", "hidden_sizes": [32, 64], "depths": [2, 1], "patch_size": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"vision_config": vision}))
    assert read_image_tower(path, image_size=64, dim=256) == tower
    path.write_text(json.dumps({"vision_config": {**vision, "model_type": "convnextv2"}}))
    second = read_image_tower(path, image_size=64, dim=256)
    assert second == replace(tower, grn=True)
    assert {part.piece.kind for part in second.parts()} - {
        part.piece.kind for part in tower.parts()
    } == {"grn-block"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "does not tell the sizes"),
        ("[]", "does not tell the sizes"),
        ('{"vision_config": 3}', "does not tell the sizes"),
        ('{"vision_config": {"hidden_size": 128}}', "'patch_size'"),
        ('{"vision_config": {"patch_size": 8.5}}', "8.5 is not a whole number"),
        ('{"vision_config": {"patch_size": true}}', "True is not a whole number"),
        ('{"vision_config": {"model_type": "swin"}}', "is of a swin"),
        ('{"vision_config": {"model_type": "convnext", "patch_size": 2}}', "is of a convnext"),
        (" " * 2**21, "too large"),
    ],
)
def test_configurations_that_tell_nothing_are_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_image_tower(path, image_size=64, dim=256)


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_image_tower(tmp_path / "config.json", image_size=64, dim=256)
