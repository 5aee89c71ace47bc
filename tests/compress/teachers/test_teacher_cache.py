"""Embed a source with the teacher, and keep the embeddings on disk."""

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.compress.data.augmentation import Augmentation, augment
from edgeclip.compress.data.sources import EmojiSource, FolderSource, captions_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import (
    TeacherCache,
    build_cache,
    embed_source,
    fast_inference,
    open_cache,
)
from edgeclip.runtime.bundle.files import read_npz, write_npz
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

SHARD = "shard-00000.npz"


@pytest.fixture
def cache(teacher: DualEncoder, source: FolderSource, tmp_path: Path) -> TeacherCache:
    return build_cache(teacher, source, tmp_path / "cache", views=2)


def test_shapes_and_settings(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource
) -> None:
    assert cache.text is not None
    assert (cache.image.shape, cache.text.shape) == ((20, 2, 32), (20, 1, 32))
    assert cache.image.dtype == cache.text.dtype == np.float16
    settings = cache.settings
    assert settings.space == space_fingerprint(teacher)
    assert settings.source == source.identity
    assert (settings.count, settings.views, settings.dim) == (20, 2, 32)
    assert settings.logit_scale == teacher.spec.logit_scale


def test_cached_embeddings_are_the_teachers(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource
) -> None:
    how = cache.settings.augmentation
    indices = range(len(source))
    for view in (0, 1):
        pictures = [augment(source[i].image, how, index=i, view=view) for i in indices]
        pixels = teacher.preprocess(pictures)
        with fast_inference(teacher):
            direct = teacher.embed_image(pixels).numpy()
        np.testing.assert_array_equal(cache.image[:, view], direct.astype(np.float16))
        with torch.inference_mode():
            exact = teacher.embed_image(pixels).numpy()
        cosine = (cache.image[:, view].astype(np.float32) * exact).sum(axis=1)
        assert cosine.min() > 0.999
    assert cache.text is not None
    with fast_inference(teacher):
        direct = teacher.embed_text(teacher.tokenize(captions_of(source, indices))).numpy()
    np.testing.assert_array_equal(cache.text[:, 0], direct.astype(np.float16))
    assert np.abs(cache.image[:, 0] - cache.image[:, 1]).max() > 1e-3


def test_every_caption_of_a_picture_is_embedded(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    rows = ["file,caption"]
    for number, path in enumerate(sorted(few_pictures.glob("*.bmp"))[:5]):
        (folder / path.name).write_bytes(path.read_bytes())
        rows += [f"{path.name},picture {number} is more {k}" for k in range(1 + number % 3)]
    (folder / "captions.csv").write_text("\n".join(rows))
    source = FolderSource(folder)
    cache = build_cache(teacher, source, tmp_path / "cache")
    assert cache.settings.texts == 3
    assert cache.text is not None
    assert cache.text.shape == (5, 3, 32)
    for index in range(5):
        captions = source.captions(index)
        assert len(captions) == 1 + index % 3
        with fast_inference(teacher):
            direct = teacher.embed_text(teacher.tokenize(list(captions))).numpy()
        # Not bit for bit: it is another batch.
        np.testing.assert_allclose(cache.text[index, : len(captions)], direct, atol=2e-2)
        assert not cache.text[index, len(captions) :].any()
    again = open_cache(tmp_path / "cache")
    np.testing.assert_array_equal(again.text, cache.text)


def test_opening_gives_what_was_built(cache: TeacherCache, tmp_path: Path) -> None:
    again = open_cache(tmp_path / "cache")
    assert again.settings == cache.settings
    np.testing.assert_array_equal(again.image, cache.image)
    assert again.text is not None
    assert cache.text is not None
    np.testing.assert_array_equal(again.text, cache.text)


def test_building_again_computes_nothing(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    path = tmp_path / "cache" / SHARD
    before = path.stat().st_mtime_ns
    build_cache(teacher, source, tmp_path / "cache", views=2)
    assert path.stat().st_mtime_ns == before


def test_pictures_without_captions(
    teacher: DualEncoder, many_pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in sorted(many_pictures.glob("*.bmp"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    cache = build_cache(teacher, FolderSource(folder), tmp_path / "cache")
    assert cache.text is None
    assert cache.image.shape == (3, 1, 32)
    assert not cache.settings.captions


def test_kill_in_the_middle_loses_the_shard_in_hand(
    teacher: DualEncoder, teacher_folder: Path, many_pictures: Path, tmp_path: Path
) -> None:
    source = FolderSource(many_pictures)
    killed = tmp_path / "killed"
    script = Path(__file__).parents[1] / "killed_run.py"
    reads = "1060"  # of 1,100: the first shard of 1,024 is done, the second is not
    done = subprocess.run(
        [sys.executable, script, "cache", teacher_folder, many_pictures, "-", killed, reads],
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in killed.glob("shard-*")] == [SHARD]
    with pytest.raises(ConfigError, match="is unfinished: run the command that made it again"):
        open_cache(killed)
    before = (killed / SHARD).stat().st_mtime_ns
    resumed = build_cache(teacher, source, killed)
    assert (killed / SHARD).stat().st_mtime_ns == before
    whole = build_cache(teacher, source, tmp_path / "whole")
    assert resumed.settings == whole.settings
    assert resumed.text is not None
    assert whole.text is not None
    assert resumed.image.tobytes() == whole.image.tobytes()
    assert resumed.text.tobytes() == whole.text.tobytes()
    assert sorted(path.name for path in killed.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_another_teacher(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.model.get_parameter("visual_projection.weight")[0, 0] += 1
    with pytest.raises(ConfigError, match="cache is a cache with another space: choose another"):
        build_cache(other, source, tmp_path / "cache", views=2)


def test_other_data(cache: TeacherCache, teacher: DualEncoder, tmp_path: Path) -> None:
    other = EmojiSource("train", 4, size=32)
    with pytest.raises(ConfigError, match="is a cache with another source, count: choose"):
        build_cache(teacher, other, tmp_path / "cache", views=2)


def test_other_views(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a cache with another views, augmentation: choose"):
        build_cache(teacher, source, tmp_path / "cache", views=3, augmentation=Augmentation(seed=1))
    assert open_cache(tmp_path / "cache").settings == cache.settings


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty])
def test_damaged_shard(
    cache: TeacherCache,
    teacher: DualEncoder,
    source: FolderSource,
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    path = tmp_path / "cache" / SHARD
    damage(path)
    with pytest.raises(ConfigError, match=rf"{SHARD} is damaged: delete it, and run") as caught:
        open_cache(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    path.unlink()
    mended = build_cache(teacher, source, tmp_path / "cache", views=2)
    assert mended.image.tobytes() == cache.image.tobytes()


def test_shard_of_another_shape(cache: TeacherCache, tmp_path: Path) -> None:
    path = tmp_path / "cache" / SHARD
    kind = "edgeclip-teacher-cache-1"
    _, arrays = read_npz(path, kind, frozenset(), frozenset(("image", "text")))
    write_npz(path, kind, {}, {**arrays, "image": arrays["image"][:, :1]})
    with pytest.raises(ConfigError, match=r"shards of another shape than cache\.json says"):
        open_cache(tmp_path / "cache")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"space": 1}'])
def test_damaged_settings(cache: TeacherCache, tmp_path: Path, text: str) -> None:
    (tmp_path / "cache" / "cache.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cache\.json"):
        open_cache(tmp_path / "cache")


def test_unknown_setting(cache: TeacherCache, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "cache.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "colour": 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match="colour: unknown key"):
        open_cache(tmp_path / "cache")


def test_no_cache_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no teacher cache \(no cache\.json\)"):
        open_cache(tmp_path)


def test_nothing_to_cache(teacher: DualEncoder, source: FolderSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a cache needs pictures and views, got 0 and 1"):
        build_cache(teacher, EmojiSource("train", 0, size=8), tmp_path / "cache")
    with pytest.raises(ConfigError, match="a cache needs pictures and views, got 20 and 0"):
        build_cache(teacher, source, tmp_path / "cache", views=0)
    assert not (tmp_path / "cache").exists()


def test_pixels_are_those_of_the_device(teacher: DualEncoder) -> None:
    white, black = Image.new("RGB", (50, 40), "white"), Image.new("RGB", (32, 32))
    pixels = teacher.preprocess([white, black])
    assert (pixels.shape, pixels.dtype) == ((2, 3, 32, 32), torch.float32)
    assert pixels[0].unique().tolist() == [1.0]  # mean and std are a half
    assert pixels[1].unique().tolist() == [-1.0]


def test_ids_are_padded_and_cut(teacher: DualEncoder) -> None:
    ids = teacher.tokenize(["red apple", "tree " * 100])
    text = teacher.spec.text
    assert (ids.shape, ids.dtype) == ((2, 40), torch.int64)
    assert ids[:, 0].tolist() == [text.bos_id] * 2
    assert ids[1, -1] == text.eos_id
    assert ids[0, -1] == text.pad_id
    assert teacher.tokenize(["red apple"]).shape[1] < 10


def test_captions(few_pictures: Path) -> None:
    source = FolderSource(few_pictures)
    assert captions_of(source, [3, 0]) == [source.caption(3), source.caption(0)]


def test_captions_where_there_are_none(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="1 pictures: this needs a caption for every picture"):
        captions_of(FolderSource(tmp_path), [0])


@pytest.mark.parametrize("training", [True, False])
def test_inference_leaves_the_mode_as_it_was(teacher: DualEncoder, training: bool) -> None:
    teacher.train(training)
    try:
        with fast_inference(teacher):
            assert not teacher.training
            embedding = teacher.embed_text(teacher.tokenize(["a tree"]))
        assert not embedding.requires_grad
        with pytest.raises(RuntimeError, match="stop"), fast_inference(teacher):
            raise RuntimeError("stop")
        assert teacher.training is training
    finally:
        teacher.eval()


def test_embedding_a_source_in_any_batches(teacher: DualEncoder) -> None:
    source = EmojiSource("test", 7, size=32)
    image, text = embed_source(teacher, source, batch_size=3)
    assert image.shape == text.shape == (7, 32)
    with torch.inference_mode():
        for index in range(7):
            pair = source[index]
            alone = teacher.embed_image(teacher.preprocess([pair.image]))[0]
            np.testing.assert_allclose(image[index], alone, atol=1e-6)
            alone = teacher.embed_text(teacher.tokenize([str(pair.caption)]))[0]
            np.testing.assert_allclose(text[index], alone, atol=1e-6)
