"""Embed a source with the teacher, and keep the embeddings on disk."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.compress.data.augmentation import Augmentation, view_crop
from edgeclip.compress.data.sources import EmojiSource, FolderSource, Pair, captions_of, seed_of
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import (
    Float16,
    TeacherCache,
    build_cache,
    embed_source,
    fast_inference,
)
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import MaxBad

pytestmark = pytest.mark.slow

FILES = ("image.rows", "text.rows")


@pytest.fixture
def cache(teacher: DualEncoder, source: FolderSource, tmp_path: Path) -> TeacherCache:
    return build_cache(teacher, source, tmp_path / "cache", views=2)


def test_shapes_and_settings(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource
) -> None:
    image, text = cache.image([3, 1, 3], [0, 1, 1]), cache.text([3, 1])
    assert (image.shape, text.shape) == ((3, 32), (2, 32))
    assert image.dtype == text.dtype == np.float16
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
        crops = [
            view_crop(
                source[i].image,
                teacher.image_spec,
                how,
                picture_seed=seed_of(source, i),
                view=view,
            )
            for i in indices
        ]
        pixels = teacher.normalise(np.stack(crops))
        with fast_inference(teacher):
            direct = teacher.embed_image(pixels).numpy()
        np.testing.assert_array_equal(cache.image(indices, view), direct.astype(np.float16))
        with torch.inference_mode():
            exact = teacher.embed_image(pixels).numpy()
        cosine = (cache.image(indices, view).astype(np.float32) * exact).sum(axis=1)
        assert cosine.min() > 0.999
    with fast_inference(teacher):
        direct = teacher.embed_text(teacher.tokenize(captions_of(source, indices))).numpy()
    np.testing.assert_array_equal(cache.text(indices), direct.astype(np.float16))
    assert np.abs(cache.image(indices, 0) - cache.image(indices, 1)).max() > 1e-3


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
    for index in range(5):
        captions = source.captions(index)
        assert len(captions) == 1 + index % 3
        with fast_inference(teacher):
            direct = teacher.embed_text(teacher.tokenize(list(captions))).numpy()
        # Not bit for bit: it is another batch.
        own = cache.text([index] * len(captions), range(len(captions)))
        np.testing.assert_allclose(own, direct, atol=2e-2)


@pytest.fixture
def embedded(teacher: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pictures and texts the teacher has embedded since."""
    count = {"image": 0, "text": 0}

    def counting(what: str) -> None:
        embed = getattr(teacher, f"embed_{what}")

        def counted(batch: torch.Tensor) -> torch.Tensor:
            count[what] += len(batch)
            found: torch.Tensor = embed(batch)
            return found

        monkeypatch.setattr(teacher, f"embed_{what}", counted)

    counting("image")
    counting("text")
    return count


def _rows(cache: TeacherCache) -> tuple[Float16, Float16]:
    """All views of all pictures, and the first caption of each."""
    indices = [index for index in range(cache.settings.count) if index not in cache.unreadable]
    views = [cache.image(indices, view) for view in range(cache.settings.views)]
    return np.stack(views, axis=1), cache.text(indices)


def _equal(one: TeacherCache, other: TeacherCache) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_rows(one), _rows(other), strict=True))


def test_building_again_computes_nothing(
    cache: TeacherCache,
    teacher: DualEncoder,
    source: FolderSource,
    tmp_path: Path,
    embedded: dict[str, int],
) -> None:
    before = [(tmp_path / "cache" / name).read_bytes() for name in FILES]
    again = build_cache(teacher, source, tmp_path / "cache")
    assert again.settings == cache.settings
    assert _equal(again, cache)
    assert embedded == {"image": 0, "text": 0}
    assert [(tmp_path / "cache" / name).read_bytes() for name in FILES] == before


def test_a_touched_or_copied_folder_computes_nothing(
    cache: TeacherCache,
    teacher: DualEncoder,
    few_pictures: Path,
    tmp_path: Path,
    embedded: dict[str, int],
) -> None:
    copy = shutil.copytree(few_pictures, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    again = build_cache(teacher, FolderSource(copy), tmp_path / "cache")
    assert again.settings == cache.settings
    assert _equal(again, cache)
    assert embedded == {"image": 0, "text": 0}


def test_new_and_changed_pictures_compute_themselves(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path, embedded: dict[str, int]
) -> None:
    data, folder = shutil.copytree(few_pictures, tmp_path / "data"), tmp_path / "cache"
    first = build_cache(teacher, FolderSource(data), folder, views=2)
    embedded.update(image=0, text=0)
    Image.new("RGB", (16, 16), "green").save(data / "0003.bmp")  # changed
    Image.new("RGB", (16, 16), "yellow").save(data / "000x.bmp")  # new, in the middle
    (data / "0012.bmp").unlink()
    table = data / "captions.csv"
    rows = [row for row in table.read_text().splitlines() if not row.startswith("0012")]
    rows[8] = rows[8].split(",")[0] + ",another caption"
    table.write_text("\n".join([*rows, "000x.bmp,a yellow picture"]))
    source = FolderSource(data)
    grown = build_cache(teacher, source, folder)
    assert embedded == {"image": 2 * 2, "text": 2}
    assert grown.settings.count == 20
    fresh = build_cache(teacher, source, tmp_path / "fresh", views=2)
    assert grown.settings == fresh.settings
    for ours, theirs in zip(_rows(grown), _rows(fresh), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # other batches
    np.testing.assert_array_equal(grown.image([0]), first.image([0]))


def test_damaged_pictures_are_left_out_until_they_are_mended(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path, embedded: dict[str, int]
) -> None:
    data, folder = shutil.copytree(few_pictures, tmp_path / "data"), tmp_path / "cache"
    whole = (data / "0005.bmp").read_bytes()
    (data / "0005.bmp").write_bytes(whole[:200])
    (data / "0009.bmp").write_bytes(b"")
    source = FolderSource(data)
    with pytest.raises(InputError, match=r"2 of 20 images cannot be read, and 1 are .*0005\.bmp"):
        build_cache(teacher, source, folder, max_bad=MaxBad(share=0.05, count=0))
    assert embedded == {"image": 18, "text": 18}
    cache = build_cache(teacher, source, folder)
    assert embedded == {"image": 18, "text": 18}
    assert cache.unreadable == (5, 9)
    assert cache.settings.count == 20
    assert [len(rows) for rows in _rows(cache)] == [18, 18]
    (data / "0005.bmp").write_bytes(whole)
    mended = build_cache(teacher, FolderSource(data), folder)
    assert embedded == {"image": 19, "text": 19}
    assert mended.unreadable == (9,)


def test_a_picture_that_can_be_read_again_is_embedded(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path, embedded: dict[str, int]
) -> None:
    class Flaky(FolderSource):
        """A folder whose fourth picture lies on a disk that is away for a while."""

        away = True

        def __getitem__(self, index: int) -> Pair:
            if self.away and index == 3:
                raise InputError("the disk is away")
            return super().__getitem__(index)

    source = Flaky(few_pictures)
    assert build_cache(teacher, source, tmp_path / "cache", workers=0).unreadable == (3,)
    assert build_cache(teacher, source, tmp_path / "cache", workers=0).unreadable == (3,)
    assert embedded["image"] == 19
    source.away = False
    assert build_cache(teacher, source, tmp_path / "cache", workers=0).unreadable == ()
    assert embedded["image"] == 20


def test_equal_pictures_are_embedded_once(
    teacher: DualEncoder, few_pictures: Path, tmp_path: Path, embedded: dict[str, int]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b", "c"):
        shutil.copyfile(few_pictures / f"000{int(name == 'c')}.bmp", data / f"{name}.bmp")
    cache = build_cache(teacher, FolderSource(data), tmp_path / "cache")
    assert embedded == {"image": 2, "text": 0}
    np.testing.assert_array_equal(cache.image([0]), cache.image([1]))


def test_pictures_without_captions(
    teacher: DualEncoder, many_pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in sorted(many_pictures.glob("*.bmp"))[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    cache = build_cache(teacher, FolderSource(folder), tmp_path / "cache")
    assert cache.image([0, 1, 2]).shape == (3, 32)
    assert not cache.settings.captions


def test_kill_in_the_middle_loses_the_batch_in_hand(
    teacher: DualEncoder,
    teacher_folder: Path,
    many_pictures: Path,
    tmp_path: Path,
    embedded: dict[str, int],
) -> None:
    source = FolderSource(many_pictures)
    killed = tmp_path / "killed"
    script = Path(__file__).parents[1] / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, "cache", teacher_folder, many_pictures, "-", killed, "200"],
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed = build_cache(teacher, source, killed)
    assert embedded == {"image": 1100 - 192, "text": 1100 - 192}  # three batches of 64 are kept
    whole = build_cache(teacher, source, tmp_path / "whole")
    assert resumed.settings == whole.settings
    assert _equal(resumed, whole)
    assert sorted(path.name for path in killed.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_another_teacher(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.model.get_parameter("visual_projection.weight")[0, 0] += 1
    with pytest.raises(ConfigError, match="cache is a cache with another teacher: choose another"):
        build_cache(other, source, tmp_path / "cache", views=2)
    (tmp_path / "cache" / "cache.json").unlink()  # the rows are the first teacher's all the same
    with pytest.raises(ConfigError, match=r"image\.rows is of other settings: delete it"):
        build_cache(other, source, tmp_path / "cache", views=2)
    assert _equal(build_cache(teacher, source, tmp_path / "cache", views=2), cache)


def test_other_data_go_beside(
    cache: TeacherCache,
    teacher: DualEncoder,
    source: FolderSource,
    tmp_path: Path,
    embedded: dict[str, int],
) -> None:
    other = build_cache(teacher, EmojiSource("train", 4, size=32), tmp_path / "cache")
    assert embedded["image"] == 8
    more = build_cache(teacher, EmojiSource("train", 6, size=32), tmp_path / "cache")
    assert embedded["image"] == 12
    np.testing.assert_array_equal(more.image(range(4), 1), other.image(range(4), 1))
    assert _equal(build_cache(teacher, source, tmp_path / "cache"), cache)
    assert embedded["image"] == 12


def test_other_views(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a cache with another views, augmentation: choose"):
        build_cache(teacher, source, tmp_path / "cache", views=3, augmentation=Augmentation(seed=1))
    assert build_cache(teacher, source, tmp_path / "cache").settings == cache.settings


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_damaged_rows_are_computed_again(
    cache: TeacherCache,
    teacher: DualEncoder,
    source: FolderSource,
    tmp_path: Path,
    embedded: dict[str, int],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    before = _rows(cache)
    damage(tmp_path / "cache" / name)
    mended = build_cache(teacher, source, tmp_path / "cache")
    assert embedded == {"image": 2 * (name == "image.rows"), "text": int(name == "text.rows")}
    for ours, theirs in zip(_rows(mended), before, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path, name: str
) -> None:
    path, before = tmp_path / "cache" / name, _rows(cache)
    path.write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=rf"{name} is damaged: delete it, and run") as caught:
        build_cache(teacher, source, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    path.unlink()
    for ours, theirs in zip(
        _rows(build_cache(teacher, source, tmp_path / "cache")), before, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"space": 1}'])
def test_damaged_settings(
    cache: TeacherCache, teacher: DualEncoder, source: FolderSource, tmp_path: Path, text: str
) -> None:
    (tmp_path / "cache" / "cache.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cache\.json"):
        build_cache(teacher, source, tmp_path / "cache")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("colour", "colour: unknown key"),
        ("version", "is of another version of the cache"),
    ],
)
def test_settings_of_another_version(
    cache: TeacherCache,
    teacher: DualEncoder,
    source: FolderSource,
    tmp_path: Path,
    key: str,
    message: str,
) -> None:
    path = tmp_path / "cache" / "cache.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, key: 1}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        build_cache(teacher, source, tmp_path / "cache")


def test_a_cache_from_another_machine(
    cache: TeacherCache,
    teacher: DualEncoder,
    source: FolderSource,
    tmp_path: Path,
    embedded: dict[str, int],
) -> None:
    path = tmp_path / "cache" / "cache.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["logit_scale"] = np.nextafter(data["logit_scale"], np.inf)  # as its exp() rounds
    path.write_text(json.dumps(data), encoding="utf-8")
    moved = build_cache(teacher, source, tmp_path / "cache")
    assert moved.settings.logit_scale == data["logit_scale"]
    assert embedded == {"image": 0, "text": 0}
    path.write_text(json.dumps({**data, "logit_scale": 2 * data["logit_scale"]}))
    with pytest.raises(ConfigError, match="is a cache with another logit_scale"):
        build_cache(teacher, source, tmp_path / "cache")


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
