import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.compress.data.packed_texts import PackedPaths, PackedTexts

# Halves of surrogate pairs too, which JSON may hold.
ITEMS = st.lists(st.lists(st.text(st.characters()), max_size=3).map(tuple), max_size=8)


@given(ITEMS)
def test_all_comes_out_again(items: list[tuple[str, ...]]) -> None:
    packed = PackedTexts.of(items)
    assert list(packed) == items
    assert [packed[-1 - place] for place in range(len(items))] == items[::-1]
    assert packed[1:3] == tuple(items[1:3])
    assert packed.any() is any(items)
    assert packed.most() == max(map(len, items), default=0)
    for beyond in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            packed[beyond]


@given(st.lists(ITEMS, max_size=4))
def test_parts_are_joined(parts: list[list[tuple[str, ...]]]) -> None:
    joined = PackedTexts.joined([PackedTexts.of(part) for part in parts])
    assert list(joined) == [item for part in parts for item in part]


def test_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "é.jpg", tmp_path / os.fsdecode(b"caf\xe9.png"), tmp_path / "z"]
    packed = PackedPaths.of(tmp_path, paths)
    assert list(packed) == paths
    assert packed[:2] == tuple(paths[:2])
