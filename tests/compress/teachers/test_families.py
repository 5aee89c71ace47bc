"""Teachers of every family: what their own library computes, EdgeCLIP computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from tests.compress.teachers.teacher_factory import FAMILIES, Teacher

pytestmark = pytest.mark.slow

SHAPES = [(32, 32), (61, 40), (37, 129), (5, 7), (300, 33)]
TEXTS = [
    "",
    "eagle left of a RED apple, on a blue background!",
    "  two\n\nspaces -- and (punctuation)...  ",
    "一只狗 собака 犬の写真 🦅",
    "a red apple left of a blue house " * 12,
]


def pictures() -> list[Image.Image]:
    """Smooth pictures of odd shapes."""
    found = []
    for width, height in SHAPES:
        y, x = np.mgrid[0:height, 0:width]
        waves = [127.5 + 127.5 * np.sin(k * x / width + 5 * y / height) for k in (3, 7, 11)]
        found.append(Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)))
    return found


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return FAMILIES[request.param](tmp_path_factory.mktemp("teacher") / str(request.param))


@pytest.fixture(scope="module")
def loaded(made: Teacher) -> DualEncoder:
    return DualEncoder.load(made.folder)


def test_pictures_are_embedded_as_by_their_own_library(made: Teacher, loaded: DualEncoder) -> None:
    with torch.inference_mode():
        ours = loaded.embed_image(loaded.preprocess(pictures()))
    torch.testing.assert_close(ours, made.embed_image(pictures()), atol=1e-5, rtol=0)


def test_texts_are_embedded_as_by_their_own_library(made: Teacher, loaded: DualEncoder) -> None:
    with torch.inference_mode():
        ours = loaded.embed_text(loaded.tokenize(TEXTS))
    torch.testing.assert_close(ours, made.embed_text(TEXTS), atol=1e-5, rtol=0)


def test_a_family_survives_saving(loaded: DualEncoder, tmp_path: Path) -> None:
    loaded.save(tmp_path / "again")
    again = DualEncoder.load(tmp_path / "again")
    assert again.space == loaded.space
    assert again.spec == loaded.spec
    assert again.logit_scale == loaded.logit_scale


def test_the_weights_of_the_towers_have_their_prefixes(loaded: DualEncoder) -> None:
    image, text = loaded.tower_parts("image"), loaded.tower_parts("text")
    names = [name for name, _ in loaded.named_parameters()]
    rest = [name for name in names if not name.startswith((*image, *text))]
    assert set(rest) <= {"model.logit_scale", "model.logit_bias"}
    for parts in (image, text):
        assert any(name.startswith(parts) for name in names)
    assert not any(name.startswith(image) and name.startswith(text) for name in names)
