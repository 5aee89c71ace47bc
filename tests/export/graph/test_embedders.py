"""The inputs of both towers from a source whose pictures have several captions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.compress.data.sources import FolderSource, relevance_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.export.graph.calibration import calibration_texts
from edgeclip.export.graph.embedders import tower_inputs


@pytest.fixture
def several(tmp_path: Path) -> FolderSource:
    rows = ["file,caption"]
    for number in range(5):
        Image.new("RGB", (40, 48), (50 * number, 0, 9)).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,picture {number}: {word}" for word in ("red", "teal", "pink")]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return FolderSource(tmp_path, split="calibration", divide=False)


def test_a_text_tower_gets_every_caption(several: FolderSource, clip: DualEncoder) -> None:
    captions = [text for index in range(5) for text in several.captions(index)]
    wanted = clip.text_tokenizer.encode(captions, truncate=True)
    for size in (1, 2, 4, 32):
        parts = list(tower_inputs(clip, "text", several, batch_size=size))
        assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
        flat = [row[row != row[-1]].tolist() for part in parts for row in part]
        assert flat == [row[row != row[-1]].tolist() for row in wanted]
    assert sum(map(len, tower_inputs(clip, "text", several, count=7))) == 7
    assert sum(map(len, tower_inputs(clip, "image", several))) == 5
    assert sum(map(len, tower_inputs(clip, "image", several, count=3))) == 3


def test_every_caption_is_embedded_and_calibrated_on(
    several: FolderSource, clip: DualEncoder
) -> None:
    image, text = embed_source(clip, several, batch_size=2)
    relevance = relevance_of(several)
    assert (len(image), len(text)) == (relevance.images, len(relevance.owner)) == (5, 15)
    assert np.array_equal(relevance.owner, np.repeat(np.arange(5), 3))
    data = calibration_texts(several, clip.text_tokenizer)
    assert sum(len(data.batch(index)) for index in range(data.count)) == 15
