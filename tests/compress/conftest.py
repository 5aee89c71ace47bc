"""A tiny CLIP teacher and small folders of pictures: real in every part, made by code."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.pretrain import TeacherShape, new_teacher

os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that tests start

SHAPE = TeacherShape(
    image_width=64,
    image_layers=4,
    text_width=64,
    text_layers=2,
    head_size=32,
    dim=32,
    vocab_size=400,
    image_size=32,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Fast where many run at once, and the same sums on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def teacher() -> DualEncoder:
    """An untrained teacher of 32 pixels and 32 dimensions; read it, do not alter it."""
    return new_teacher(SHAPE, seed=0).eval()


@pytest.fixture(scope="session")
def teacher_folder(teacher: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    teacher.save(folder)
    return folder


@pytest.fixture(scope="session")
def few_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 pictures with captions."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "few", 20)


@pytest.fixture(scope="session")
def source(few_pictures: Path) -> FolderSource:
    """The same as a source."""
    return FolderSource(few_pictures)


@pytest.fixture(scope="session")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 1,100 pictures with captions: more than one shard of a cache."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "many", 1100)


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file,caption"]
    for number in range(count):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04d}.bmp")
        colour = "red" if pixels[..., 0].mean() > pixels[..., 2].mean() else "blue"
        rows.append(f"{number:04d}.bmp,picture {number} is more {colour}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
