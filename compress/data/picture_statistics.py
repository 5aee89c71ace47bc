"""Measure how sharp, bright, rich in contrast and noisy pictures are, and how large their files."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from edgeclip.compress.data.sources import FolderSource, Source
from edgeclip.runtime.bundle.files import require_space
from edgeclip.runtime.bundle.rows import KEY_BYTES, RowFile, row_bytes
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.preprocess import resize_and_crop
from edgeclip.runtime.spec import ImageSpec

MEASURES = ("sharpness", "brightness", "contrast", "noise")
_FLOATS = ("short_side", "long_side", *MEASURES)
THUMBNAIL = 16  # pixels of a side
_ROW_BYTES = 4 * len(_FLOATS) + THUMBNAIL**2
_CHUNK = 16  # pictures that a worker measures at a time
_AT_A_TIME = 8192  # rows that are unpacked
_FEW = 64  # so few are not worth the start of workers
_NAMED = 100  # of unreadable pictures the reason is kept, for a set may have a million
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

Floats = NDArray[np.float32]


def measure(pixels: NDArray[np.uint8]) -> Floats:
    """Measure one picture on its luminance (ITU-R BT.601): float32 [4], in the order of `MEASURES`.

    - Sharpness: the variance of the Laplacian (Pech-Pacheco et al. 2000, "Diatom autofocusing in
      brightfield microscopy"), with the mask 0 1 0 / 1 -4 1 / 0 1 0 and levels from 0 to 255, as
      in OpenCV. Little of it is blur, or a picture with nothing in it.
    - Brightness: the mean, from 0 (black) to 1 (white).
    - Contrast: RMS contrast, the standard deviation of levels from 0 to 1 (Peli 1990, "Contrast in
      complex images"); at most 0.5.
    - Noise: the standard deviation of additive noise in levels from 0 to 255 (Immerkaer 1996,
      "Fast noise variance estimation"), which takes fine texture for noise.

    Args:
        pixels: uint8 [height, width, 3], at least 3 by 3.
    """
    grey = pixels.astype(np.float32) @ _LUMA
    scaled = grey / 255
    # Both masks are made of second differences: their sum is the Laplacian, and the second
    # difference down of that across is Immerkaer's mask.
    across = grey[:, :-2] - 2 * grey[:, 1:-1] + grey[:, 2:]
    down = grey[:-2] - 2 * grey[1:-1] + grey[2:]
    laplacian = across[1:-1] + down[:, 1:-1]
    residual = across[:-2] - 2 * across[1:-1] + across[2:]
    noise = np.sqrt(np.pi / 2) * np.abs(residual).mean(dtype=np.float64) / 6
    found = (
        laplacian.var(dtype=np.float64),
        scaled.mean(dtype=np.float64),
        scaled.std(dtype=np.float64),
        noise,
    )
    return np.array(found, np.float32)


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean luminance of 16 by 16 parts of a picture, uint8 [256].

    Args:
        pixels: uint8 [height, width, 3].
    """
    small = Image.fromarray(pixels).convert("L")
    small = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


@dataclass(frozen=True, slots=True)
class PictureStatistics:
    """What was measured of N pictures, a column each; NaN where a picture cannot be read.

    Attributes:
        content: of each picture, uint8 [N, 32], zeros where its file cannot be read.
        readable: bool [N].
        short_side, long_side: pixels of the picture as stored, float32 [N].
        sharpness, brightness, contrast, noise: see `measure`, of the pixels that the model sees,
            float32 [N].
        thumbnails: see `thumbnail`, likewise; uint8 [N, 256].
        reasons: why the first hundred unreadable pictures are so, by their index.
    """

    content: NDArray[np.uint8]
    readable: NDArray[np.bool_]
    short_side: Floats
    long_side: Floats
    sharpness: Floats
    brightness: Floats
    contrast: Floats
    noise: Floats
    thumbnails: NDArray[np.uint8]
    reasons: dict[int, str]

    def __len__(self) -> int:
        return len(self.content)

    def column(self, name: str) -> Floats:
        """Return the column of that name."""
        found: Floats = getattr(self, name)
        return found


def measure_source(source: Source, spec: ImageSpec, folder: Path) -> PictureStatistics:
    """Measure every picture of a source, as a model with the input contract `spec` sees it.

    What was measured is kept in `folder`, in `statistics.rows`, under the content of the picture:
    a run that was stopped goes on where it was, and only new or changed pictures are measured.

    Raises:
        InputError: `folder` cannot be written, or holds statistics for another input contract.
    """
    count = len(source)
    content, reasons = _contents(source)
    readable = content.any(axis=1)
    # Its normalisation changes nothing that is measured.
    settings = {name: value for name, value in asdict(spec).items() if name not in ("mean", "std")}
    mend = "delete it, and run the command again"
    path = folder / "statistics.rows"
    there = path.stat().st_size if path.exists() else 0
    require_space(folder, max(0, row_bytes(count, (_ROW_BYTES,), np.uint8) - there))
    table = np.full((count, len(_FLOATS)), np.nan, np.float32)
    thumbnails = np.zeros((count, THUMBNAIL**2), np.uint8)
    with closing(
        RowFile(
            path,
            shape=(_ROW_BYTES,),
            dtype=np.uint8,
            settings={"floats": _FLOATS, **settings},
            mend=mend,
        )
    ) as file:
        lacking: dict[bytes, int] = {}
        for index in np.flatnonzero(readable).tolist():
            key = content[index].tobytes()
            if key not in file:
                lacking.setdefault(key, index)
        failed = _measure_lacking(source, spec, tuple(lacking.values()), content, file, reasons)
        known = []
        for index in np.flatnonzero(readable).tolist():
            first = failed.get(content[index].tobytes())
            if first is None:
                known.append(index)
            elif first != index:
                _note(reasons, index, f"the same as picture {first}")
        for first in range(0, len(known), _AT_A_TIME):
            part = known[first : first + _AT_A_TIME]
            rows = file.rows([content[index].tobytes() for index in part])
            table[part] = np.ascontiguousarray(rows[:, : 4 * len(_FLOATS)]).view("<f4")
            thumbnails[part] = rows[:, 4 * len(_FLOATS) :]
    return PictureStatistics(
        content=content,
        readable=~np.isnan(table[:, 0]),
        reasons=reasons,
        thumbnails=thumbnails,
        **{name: table[:, place].copy() for place, name in enumerate(_FLOATS)},
    )


def _contents(source: Source) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Return the content of each picture, and why others have none."""
    found = np.zeros((len(source), KEY_BYTES), np.uint8)
    reasons: dict[int, str] = {}
    for index in tqdm(range(len(source)), desc="hash", unit="img", dynamic_ncols=True):
        try:
            found[index] = np.frombuffer(bytes.fromhex(source.content(index)), np.uint8)
        except InputError as error:
            _note(reasons, index, str(error))
    return found, reasons


def _note(reasons: dict[int, str], index: int, reason: str) -> None:
    if len(reasons) < _NAMED:
        reasons[index] = reason


def _measure_lacking(
    source: Source,
    spec: ImageSpec,
    indices: Sequence[int],
    content: NDArray[np.uint8],
    file: RowFile,
    reasons: dict[int, str],
) -> dict[bytes, int]:
    """Measure these pictures into `file`; return those that cannot be read, by their content."""
    failed: dict[bytes, int] = {}
    chunks = _Chunks(source, spec, indices)
    with tqdm(total=len(indices), desc="measure", unit="img", dynamic_ncols=True) as bar:
        for part, rows, bad in _loaded(chunks, len(indices)):
            good = [index for index in part if index not in bad]
            if good:
                file.append([content[index].tobytes() for index in good], rows)
            for index, reason in bad.items():
                _note(reasons, index, reason)
                failed[content[index].tobytes()] = index
            bar.update(len(part))
    return failed


_Measured = tuple[list[int], NDArray[np.uint8], dict[int, str]]


class _Chunks(Dataset[_Measured]):
    """Indices in chunks, the rows of those that can be read, and why others cannot."""

    def __init__(self, source: Source, spec: ImageSpec, indices: Sequence[int]) -> None:
        self._source, self._spec, self._indices = source, spec, np.array(indices, np.int64)

    def __len__(self) -> int:
        return -(-len(self._indices) // _CHUNK)

    def __getitem__(self, number: int) -> _Measured:
        part = self._indices[number * _CHUNK : (number + 1) * _CHUNK].tolist()
        rows, bad = [], {}
        for index in part:
            try:
                image, (short, long) = _open(self._source, index)
                pixels = resize_and_crop(image, self._spec)
                floats = np.array([short, long, *measure(pixels)], "<f4")
                rows.append(np.concatenate([floats.view(np.uint8), thumbnail(pixels)]))
            except InputError as error:
                bad[index] = str(error)
        return part, np.array(rows, np.uint8).reshape(-1, _ROW_BYTES), bad


def _open(source: Source, index: int) -> tuple[Image.Image, tuple[int, int]]:
    """Return a picture, and its shorter and longer side as stored."""
    image = source[index].image
    size = image.size
    if isinstance(source, FolderSource):  # which decodes large JPEG files at a reduced size
        try:
            with Image.open(source.paths[index]) as header:
                size = header.size
        except (OSError, Image.DecompressionBombError):
            pass  # not a format of Pillow's
    return image, (min(size), max(size))


def _loaded(chunks: _Chunks, count: int) -> "DataLoader[Any]":
    workers = (os.cpu_count() or 1) if count >= _FEW and sys.platform == "linux" else 0
    return DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_deaf_to_interrupts if workers else None,
        collate_fn=_as_it_is,
    )


def _deaf_to_interrupts(_: int) -> None:
    """Leave Ctrl-C to the process that started this one: it ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    """Make no tensors of it."""
    return item
