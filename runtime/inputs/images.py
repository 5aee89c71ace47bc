"""Load images from paths, bytes, Pillow images and arrays as upright 8-bit RGB.

HEIC, JPEG XL and camera raw files are read by the packages of the extra `images`. None of them
brings GPL code: pi-heif-decoder bundles libheif and libde265 (LGPL-3.0), pylibjxl libjxl
(BSD-3-Clause), rawpy LibRaw (LGPL-2.1 or CDDL-1.0) without its GPL demosaic packs. pillow-heif
would bring x265 (GPL-2.0), pillow-jxl-plugin is under the GPL-3.0 itself, and pi-heif has ended at
a libheif with known holes. AVIF needs nothing here: Pillow's wheels hold libavif with dav1d and
libaom (BSD-2-Clause).
"""

import functools
import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from edgeclip.runtime.errors import EdgeClipError, InputError

_SIXTEEN_BIT_STEP = 257  # 65535 / 255
# A float image that was resampled overshoots [0, 1] a little; more is a mistake.
_OVERSHOOT = 1e-3
LIMIT_VARIABLE = "EDGECLIP_MAX_MEGAPIXELS"
ImageInput = str | Path | bytes | Image.Image | NDArray[Any]
Box = tuple[float, float, float, float]
IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff"),
        ".webp",
    }
)
# Only formats decoded in process: Pillow would pass EPS files to Ghostscript. They are tried in
# order, so those that a build of Pillow may lack come last.
_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "ICO"),
    *("QOI", "TGA", "AVIF"),
)
# A JPEG may be reduced while decoding to this many times the side that is needed. On textured
# images (spectrum 1/f), 2 times differs from a full decode by 1.0 to 1.5 levels on average, 3
# times by less than 0.7.
_REDUCE_TO = 3
_ORIENTATION = 0x0112  # EXIF 2.32, tag "Orientation"
# Where Pillow looks for an orientation: EXIF, EXIF in a PNG text chunk, XMP.
_ORIENTED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_Found = Image.Image | NDArray[Any] | bytes  # bytes: an encoded image in a common format
_File = Path | io.BytesIO
_PixelCheck = Callable[[tuple[int, int]], None]  # refuses a (width, height) that is too large


@dataclass(frozen=True, slots=True)
class _Format:
    """A format, the module that reads it, and the suffixes that its files have."""

    name: str
    module: str
    suffixes: frozenset[str]


_HEIC = _Format("HEIC", "pi_heif", frozenset({".heic", ".heif", ".hif"}))
_JXL = _Format("JPEG XL", "pylibjxl", frozenset({".jxl"}))
_RAW = _Format(
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
_MORE_FORMATS = (_HEIC, _JXL, _RAW)
MORE_SUFFIXES = frozenset().union(*(item.suffixes for item in _MORE_FORMATS))

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


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image, which may have been reduced while decoding.

    `image` is RGB and upright. `full_size` is the (width, height) before the reduction, and
    `region` the box of `image` (left, upper, right, lower, in pixels) that shows the full
    image: the size of a JPEG reduced by 8 is rounded up to whole pixels, the region is not.
    """

    image: Image.Image
    full_size: tuple[int, int]
    region: Box


def load_image(source: ImageInput, *, min_side: int | None = None) -> Image.Image:
    """Load any image input as an upright RGB Pillow image.

    HEIC, JPEG XL and the previews of camera raw files need the extra `images`.
    EXIF rotation is applied and only the first frame of an animated file is read; of a
    Pillow image, the current frame. Transparency is composited over white (see
    `image_to_rgb`), 16-bit grey is scaled, CMYK, YCCK and palettes are converted.

    Args:
        source: path, encoded file as bytes, Pillow image, or array (see `array_to_rgb`).
        min_side: the shortest side, in pixels, that will be needed. A large JPEG file is
            then reduced while decoding, to no less than three times that.

    Raises:
        InputError: no such file, a directory, damaged or unknown data, more pixels than
            Pillow's guard against decompression bombs or $EDGECLIP_MAX_MEGAPIXELS allows, or an
            array that is not an image.
    """
    return decode_image(source, min_side=min_side).image


def decode_image(source: ImageInput, *, min_side: int | None = None) -> DecodedImage:
    """Load an image as `load_image` does; return its full size and region too."""
    if isinstance(source, np.ndarray):
        image = array_to_rgb(source)
        region = (0.0, 0.0, float(image.width), float(image.height))
        return DecodedImage(image, image.size, region)
    if isinstance(source, Image.Image):
        return _decode(source, "the Pillow image", None)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_and_decode(io.BytesIO(source), f"{len(source)} bytes", min_side)
    if isinstance(source, str | os.PathLike):
        return _open_and_decode(_existing_file(source), str(source), min_side)
    raise InputError(
        f"cannot load an image from {type(source).__name__}: "
        "give a path, bytes, a Pillow image or a numpy array"
    )


def as_image_list(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """Return one image or several as a list; an array is a batch only if it has four dimensions."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray):
        return list(images)
    return [images]


def _suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES | MORE_SUFFIXES))


def _existing_file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"image {path} does not exist: check the path") from None
    except (OSError, ValueError) as error:  # no permission, too long, a null character
        raise InputError(f"image path {str(path)[:200]!r} cannot be used: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a directory: give a file, or list its images first")
    return path


def _open_and_decode(file: Path | io.BytesIO, name: str, min_side: int | None) -> DecodedImage:
    limit = _pixel_limit()

    def check(size: tuple[int, int]) -> None:
        if limit is not None and size[0] * size[1] > limit:
            raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels")

    try:
        more = _open_more(file, check, min_side)
        if more is None:
            with Image.open(file, formats=_usable_formats()) as image:
                check(image.size)
                if not (image.format == "TIFF" and _is_raw_tiff(image)):
                    return _decode(image, name, min_side)
            more = _open_raw(file, min_side)
        return decode_image(more, min_side=min_side)
    except EdgeClipError as error:
        told = str(error)
        raise InputError(told if told.startswith(name) else f"{name}: {told}") from error
    except Exception as error:
        raise _unreadable(name, error) from error


@functools.cache
def _usable_formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow has; it refuses to look for any other."""
    return tuple(item for item in _FORMATS if item != "AVIF" or features.check("avif"))


def _pixel_limit() -> int | None:
    """Return the most pixels that an image file may have; None for any number.

    It is Pillow's own (179 million), or $EDGECLIP_MAX_MEGAPIXELS million: Pillow's guard, which
    the whole process shares, is then set to that.

    Raises:
        InputError: the variable holds something else than a number above 0.
    """
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    try:
        limit = int(float(given) * 1e6)
    except (ValueError, OverflowError):
        limit = 0
    if limit < 1:
        raise InputError(f"{LIMIT_VARIABLE} is {given!r}: give a number of megapixels, such as 250")
    if limit != Image.MAX_IMAGE_PIXELS:  # Pillow warns of more, and refuses twice as many
        Image.MAX_IMAGE_PIXELS = limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return limit


def _decode(image: Image.Image, name: str, min_side: int | None) -> DecodedImage:
    full_size = image.size
    if 0 in full_size:
        raise InputError(f"{name} is empty, {full_size[0]} x {full_size[1]} pixels")
    try:
        region = _reduce(image, min_side)
        image.load()
        orientation = _orientation(image)
        rgb = image_to_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a decoder can raise anything on damaged data
        raise _unreadable(name, error) from error
    if region is None:
        full_size = rgb.size  # Pillow may rotate a TIFF file while loading it
        region = (0.0, 0.0, float(rgb.width), float(rgb.height))
    return _apply_orientation(rgb, full_size, region, orientation)


def _reduce(image: Image.Image, min_side: int | None) -> Box | None:
    """Ask the JPEG decoder for a reduced image; return the region of the full image in it."""
    if min_side is None:
        return None
    side = _REDUCE_TO * min_side
    drafted = image.draft(None, (side, side))
    return None if drafted is None else drafted[1]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data does not affect the pixels
        return 1


def _apply_orientation(
    image: Image.Image, full_size: tuple[int, int], region: Box, orientation: int
) -> DecodedImage:
    """Apply an EXIF orientation to an image, its region and its full size."""
    method = _TRANSPOSE.get(orientation)
    if method is None:
        return DecodedImage(image, full_size, region)
    left, upper, right, lower = region
    upright = image.transpose(method)
    for key in _ORIENTED_BY:  # or it would be applied again when the result is loaded
        upright.info.pop(key, None)
    # Orientations 5 to 8 swap the axes; the flips are those of the upright image.
    if orientation >= 5:
        left, upper, right, lower = upper, left, lower, right
        full_size = (full_size[1], full_size[0])
    if orientation in (2, 3, 6, 7):
        left, right = upright.width - right, upright.width - left
    if orientation in (3, 4, 7, 8):
        upper, lower = upright.height - lower, upright.height - upper
    return DecodedImage(upright, full_size, (left, upper, right, lower))


def _unreadable(name: str, error: Exception) -> InputError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return InputError(
            f"{name} has too many pixels to be safe ({error}): scale it down first, or allow it "
            f"with {LIMIT_VARIABLE}=NUMBER"
        )
    if isinstance(error, UnidentifiedImageError):
        is_named_so = Path(name).suffix.lower() in IMAGE_SUFFIXES | MORE_SUFFIXES
        more = ", whatever its name says" if is_named_so else f" ({_suffixes()})"
        return InputError(f"{name} is not an image of a known format{more}")
    if isinstance(error, PermissionError):
        return InputError(f"{name} may not be read: check its permissions")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name} cannot be decoded, it may be truncated or corrupt ({reason})")


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any Pillow mode to RGB.

    Transparency (a channel, a palette entry or a key colour) is composited over white:
    cut-out images (products, logos, glyphs) are meant for a light page, and the colour
    stored under transparent pixels is arbitrary, often black. 16-bit grey is scaled by
    255/65535, never clipped. Colour profiles are ignored, as in CLIP's own processor.

    Raises:
        InputError: grey values beyond 16 bits, or floats outside [0, 1].
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _from_array(_sixteen_to_eight(np.asarray(image)))
    if image.mode == "I":
        return _from_array(_grey_of_integers(np.asarray(image)))
    if image.mode == "F":
        return _from_array(_float_to_eight(np.asarray(image)))
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def array_to_rgb(array: NDArray[Any]) -> Image.Image:
    """Convert an array to an RGB image.

    Args:
        array: [height, width] or [height, width, channels] with 1 (grey), 3 (RGB) or 4
            (RGBA) channels; uint8, uint16, or float in [0, 1].

    Raises:
        InputError: another shape or dtype, an empty array, NaN or infinity, or floats
            outside [0, 1].
    """
    _check_shape(array.shape)
    if array.dtype == np.uint8:
        eight = array
    elif array.dtype == np.uint16:
        eight = _sixteen_to_eight(array)
    elif array.dtype.kind == "f":
        eight = _float_to_eight(array)
    else:
        raise InputError(
            f"an image array has dtype {array.dtype}: "
            "convert it to uint8, uint16, or float in [0, 1]"
        )
    if eight.ndim == 3 and eight.shape[2] == 1:
        eight = eight[:, :, 0]
    return image_to_rgb(_from_array(eight))


def _check_shape(shape: tuple[int, ...]) -> None:
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if not fits:
        message = (
            f"an image array has shape {shape}: "
            "give [height, width] or [height, width, 1, 3 or 4 channels]"
        )
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            message += "; channels come first here, so use array.transpose(1, 2, 0)"
        elif len(shape) == 4:
            message += "; this looks like a batch, so pass its images as a list"
        raise InputError(message)
    if 0 in shape:
        raise InputError(f"an image array is empty, shape {shape}: give at least one pixel")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    """Convert uint8 grey, RGB or RGBA to an image; grey becomes RGB, alpha stays."""
    image = Image.fromarray(np.ascontiguousarray(array))
    return image.convert("RGB") if image.mode == "L" else image


def _sixteen_to_eight(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, rounded to the nearest."""
    wide = array.astype(np.uint32)
    return ((wide + _SIXTEEN_BIT_STEP // 2) // _SIXTEEN_BIT_STEP).astype(np.uint8)


def _grey_of_integers(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert Pillow's mode I, in which PGM and some TIFF files hold 16-bit grey, to 8 bits."""
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise InputError(
            f"integer grey values span {low} to {high}: scale them to 16 bits, 0 to 65535"
        )
    return _sixteen_to_eight(array)


def _float_to_eight(array: NDArray[Any]) -> NDArray[np.uint8]:
    if not np.isfinite(array).all():
        raise InputError("an image holds NaN or infinity: replace them before encoding")
    low, high = float(array.min()), float(array.max())
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        hint = "divide by 255" if low >= 0 and high <= 255 else "scale them to [0, 1]"
        raise InputError(
            f"float pixels span {low:.6g} to {high:.6g}, but must lie in [0, 1]: {hint}"
        )
    rounded = np.rint(np.clip(array, 0, 1).astype(np.float32) * 255)
    eight: NDArray[np.uint8] = rounded.astype(np.uint8)
    return eight


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey converts only to LA
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def why_unreadable(suffix: str) -> str | None:
    """Return why files with this suffix cannot be read here; None if they can."""
    for item in _MORE_FORMATS:
        if suffix.lower() in item.suffixes and find_spec(item.module) is None:
            return _missing(item)
    if suffix.lower() == ".avif" and not features.check("avif"):
        return "AVIF, which needs Pillow 11.3 or later to be read"
    return None


def _missing(item: _Format) -> str:
    return f"{item.name}, which needs pip install 'edgeclip[images]' to be read"


def _open_more(file: _File, check: _PixelCheck, min_side: int | None) -> _Found | None:
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
        return _open_raw(file, min_side)
    return None


def _is_raw_tiff(image: Image.Image) -> bool:
    """Tell whether a TIFF file is a camera's raw file, whose first image is a small copy."""
    tags = getattr(image, "tag_v2", {})
    small_copy = tags.get(_SUBFILE, 0) & 1 and _SUB_IFDS in tags
    return bool(_DNG_VERSION in tags or small_copy or tags.get(_PHOTOMETRIC) in _SENSOR_DATA)


def _head(file: _File) -> bytes:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(32)
    head = file.read(32)  # getbuffer() would copy the whole file
    file.seek(0)
    return head


def _open_heic(file: _File, check: _PixelCheck) -> Image.Image:
    _need(_HEIC)
    from pi_heif.heif import open_heif

    container = open_heif(file, convert_hdr_to_8bit=True)
    check(container.size)
    return container.to_pillow()  # libheif has turned it; the orientation of its EXIF is 1


def _open_jxl(file: _File, check: _PixelCheck) -> NDArray[Any]:
    _need(_JXL)
    import pylibjxl

    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    header = pylibjxl.probe(data)
    check((header["width"], header["height"]))
    pixels: NDArray[Any] = pylibjxl.decode(data)  # libjxl turns it
    if pixels.ndim == 3 and pixels.shape[2] == 2:  # grey with alpha
        return np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    return pixels


def _open_raw(file: _File, min_side: int | None) -> NDArray[Any] | bytes:
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


def _need(item: _Format) -> None:
    if find_spec(item.module) is None:
        raise InputError(_missing(item))
