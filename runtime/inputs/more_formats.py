"""HEIC, JPEG XL and camera raw files, which the packages of the extra `images` read.

None of them brings GPL code: pi-heif-decoder bundles libheif and libde265 (LGPL-3.0), pylibjxl
libjxl (BSD-3-Clause), rawpy LibRaw (LGPL-2.1 or CDDL-1.0) without its GPL demosaic packs.
pillow-heif would bring x265 (GPL-2.0), pillow-jxl-plugin is under the GPL-3.0 itself, and pi-heif
has ended at a libheif with known holes. AVIF needs nothing here: Pillow's wheels hold libavif with
dav1d and libaom (BSD-2-Clause).
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from edgeclip.runtime.errors import InputError

Found = Image.Image | NDArray[Any] | bytes  # bytes: an encoded image in a common format
File = Path | io.BytesIO
PixelCheck = Callable[[tuple[int, int]], None]  # refuses a (width, height) that is too large


@dataclass(frozen=True, slots=True)
class Format:
    """A format, the module that reads it, and the suffixes that its files have."""

    name: str
    module: str
    suffixes: frozenset[str]


_HEIC = Format("HEIC", "pi_heif", frozenset({".heic", ".heif", ".hif"}))
_JXL = Format("JPEG XL", "pylibjxl", frozenset({".jxl"}))
_RAW = Format(
    "camera raw",
    "rawpy",
    frozenset(
        {
            *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq"),
            *(".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2"),
            *(".rwl", ".sr2", ".srf", ".srw", ".x3f"),
        }
    ),
)
_FORMATS = (_HEIC, _JXL, _RAW)
MORE_SUFFIXES = frozenset().union(*(item.suffixes for item in _FORMATS))

# ISO/IEC 23008-12, annex B: the brands of HEVC-coded HEIF; "mif1" and "msf1" may hold anything.
_HEIF_BRANDS = frozenset(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
)
_JXL_BEGINS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")  # ISO/IEC 18181-2
# Raw files that are no TIFF, or a TIFF with another mark: Fujifilm, Olympus, Panasonic, Sigma.
_RAW_BEGINS = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb")
_DNG_VERSION, _SUBFILE, _SUB_IFDS, _PHOTOMETRIC = 50706, 254, 330, 262  # TIFF tags
_SENSOR_DATA = (32803, 34892)  # photometric: a colour filter array, linear raw
# LibRaw's flip, as what to do with a preview that is a bitmap.
_TURNS = {3: 2, 5: 1, 6: 3}


def why_unreadable(suffix: str) -> str | None:
    """Return why files with this suffix cannot be read here; None if they can."""
    for item in _FORMATS:
        if suffix.lower() in item.suffixes and find_spec(item.module) is None:
            return _missing(item)
    if suffix.lower() == ".avif" and not features.check("avif"):
        return "AVIF, which needs Pillow 11.3 or later to be read"
    return None


def _missing(item: Format) -> str:
    return f"{item.name}, which needs pip install 'edgeclip[images]' to be read"


def open_more(file: File, check: PixelCheck, min_side: int | None) -> Found | None:
    """Open a file of one of these formats; None if it is of none of them.

    Args:
        file: a path or the file's bytes.
        check: refuses a size that is too large, before the pixels are decoded.
        min_side: the shortest side that will be needed, in pixels; None if any will do.

    Raises:
        InputError: the package is missing, or a raw file has no preview that is large enough.
        Exception: whatever the package raises about damaged data.
    """
    head = _head(file)
    if head.startswith(_JXL_BEGINS):
        return _open_jxl(file, check)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head:
        return _open_heic(file, check)
    is_raw = isinstance(file, Path) and file.suffix.lower() in _RAW.suffixes
    if is_raw or head.startswith(_RAW_BEGINS) or head[4:12] == b"ftypcrx ":
        return open_raw(file, min_side)
    return None


def is_raw_tiff(image: Image.Image) -> bool:
    """Tell whether a TIFF file is a camera's raw file, whose first image is a small copy."""
    tags = getattr(image, "tag_v2", {})
    small_copy = tags.get(_SUBFILE, 0) & 1 and _SUB_IFDS in tags
    return bool(_DNG_VERSION in tags or small_copy or tags.get(_PHOTOMETRIC) in _SENSOR_DATA)


def _head(file: File) -> bytes:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(32)
    return bytes(file.getbuffer()[:32])


def _open_heic(file: File, check: PixelCheck) -> Image.Image:
    _need(_HEIC)
    from pi_heif.heif import open_heif

    container = open_heif(file, convert_hdr_to_8bit=True)
    check(container.size)
    return container.to_pillow()  # libheif has turned it; the orientation of its EXIF is 1


def _open_jxl(file: File, check: PixelCheck) -> NDArray[Any]:
    _need(_JXL)
    import pylibjxl

    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    header = pylibjxl.probe(data)
    check((header["width"], header["height"]))
    pixels: NDArray[Any] = pylibjxl.decode(data)  # libjxl turns it
    if pixels.ndim == 3 and pixels.shape[2] == 2:  # grey with alpha
        return np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    return pixels


def open_raw(file: File, min_side: int | None) -> NDArray[Any] | bytes:
    """Open the largest preview in a camera's raw file: a JPEG file, or pixels that are turned.

    Raises:
        InputError: rawpy is missing, or there is no preview, or none that is large enough.
    """
    _need(_RAW)
    import rawpy

    if not isinstance(file, Path):
        file.seek(0)
    try:
        with rawpy.imread(str(file) if isinstance(file, Path) else file) as raw:
            preview, flip = raw.extract_thumb(), raw.sizes.flip
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
        raise InputError(
            "a raw file without a preview that can be read: export it as JPEG or TIFF"
        ) from None
    except rawpy.LibRawError as error:
        reason = error.args[0] if error.args else ""
        told = reason.decode() if isinstance(reason, bytes) else reason
        raise InputError(f"cannot be decoded as a raw file ({told})") from error
    found: NDArray[Any] | bytes = preview.data
    if isinstance(found, bytes):
        with Image.open(io.BytesIO(found), formats=("JPEG",)) as image:
            size = image.size
    else:
        found = np.rot90(found, _TURNS.get(flip, 0))
        size = (found.shape[1], found.shape[0])
    if min_side is not None and min(size) < min_side:
        raise InputError(
            f"a raw file whose preview has only {size[0]} x {size[1]} pixels, where a shortest "
            f"side of {min_side} is needed: export it as JPEG or TIFF"
        )
    return found


def _need(item: Format) -> None:
    if find_spec(item.module) is None:
        raise InputError(_missing(item))
