import pytest

from edgeclip.profiles.predict.tower_shapes import (
    ConvTower,
    Part,
    Piece,
    TransformerTower,
    image_tokens,
)

IMAGE = TransformerTower(
    part="image", width=128, heads=2, hidden=512, layers=4, tokens=65, dim=256, patch=8
)


def counts(parts: tuple[Part, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        found[part.piece.kind] = found.get(part.piece.kind, 0) + part.count
    return found


def test_an_image_tower_is_a_stem_blocks_and_a_last_layer() -> None:
    assert counts(IMAGE.parts()) == {"image-stem": 1, "image-block": 3, "image-last": 1}
    assert IMAGE.image_size == 64
    assert IMAGE.stem() == Piece(kind="image-stem", width=128, positions=64, patch=8)
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
    assert tower.down(1) == Piece(kind="conv-down", width=96, positions=64, given=48)
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
