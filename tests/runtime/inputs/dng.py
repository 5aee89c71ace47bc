"""Make a camera's raw file: a DNG with a JPEG preview first and the sensor's data in a sub-image.

Source: Digital Negative Specification 1.4; TIFF 6.0.
"""

import io
import struct

from PIL import Image

_SIDE = 64  # of the sensor, in pixels
_SENSOR = struct.pack("<H", 1000) * _SIDE**2
_BYTE, _TEXT, _SHORT, _LONG, _RATIO, _SIGNED_RATIO = 1, 2, 3, 4, 5, 10
_START = 8
_Entry = tuple[int, int, int, bytes | int]


def dng(preview: Image.Image | None, orientation: int = 1) -> bytes:
    """Return the file; `orientation` is that of EXIF, and of the preview too."""
    stream = io.BytesIO()
    if preview is not None:
        preview.save(stream, "JPEG", quality=95)
    jpeg = stream.getvalue()
    # Sizes do not depend on the places, which are known afterwards.
    jpeg_at = _START + len(_first(preview, orientation, 0, 0, 0))
    sensor_at = jpeg_at + len(jpeg) + len(jpeg) % 2
    data_at = sensor_at + len(_sensor(sensor_at, 0))
    parts = struct.pack("<2sHI", b"II", 42, _START)
    parts += _first(preview, orientation, jpeg_at, len(jpeg), sensor_at)
    return (parts + jpeg).ljust(sensor_at, b"\0") + _sensor(sensor_at, data_at) + _SENSOR


def _first(
    preview: Image.Image | None, orientation: int, jpeg_at: int, size: int, sensor_at: int
) -> bytes:
    identity = b"".join(struct.pack("<ii", place % 4 == 0, 1) for place in range(9))
    entries: list[_Entry] = [
        (271, _TEXT, 5, b"Made\0"),
        (272, _TEXT, 5, b"Made\0"),
        (274, _SHORT, 1, orientation),
        (330, _LONG, 1, sensor_at),
        (50706, _BYTE, 4, b"\1\4\0\0"),  # DNGVersion
        (50707, _BYTE, 4, b"\1\1\0\0"),
        (50708, _TEXT, 5, b"Made\0"),
        (50721, _SIGNED_RATIO, 9, identity),  # ColorMatrix1
        (50728, _RATIO, 3, struct.pack("<6I", 1, 1, 1, 1, 1, 1)),
        (50778, _SHORT, 1, 21),
    ]
    if preview is not None:
        entries += [
            (254, _LONG, 1, 1),  # a copy of reduced size
            (256, _LONG, 1, preview.width),
            (257, _LONG, 1, preview.height),
            (258, _SHORT, 3, struct.pack("<3H", 8, 8, 8)),
            (259, _SHORT, 1, 7),  # JPEG
            (262, _SHORT, 1, 6),  # YCbCr
            (273, _LONG, 1, jpeg_at),
            (277, _SHORT, 1, 3),
            (278, _LONG, 1, preview.height),
            (279, _LONG, 1, size),
        ]
    return _directory(entries, _START)


def _sensor(at: int, data_at: int) -> bytes:
    return _directory(
        [
            (254, _LONG, 1, 0),
            (256, _LONG, 1, _SIDE),
            (257, _LONG, 1, _SIDE),
            (258, _SHORT, 1, 16),
            (259, _SHORT, 1, 1),
            (262, _SHORT, 1, 32803),  # a colour filter array
            (273, _LONG, 1, data_at),
            (277, _SHORT, 1, 1),
            (278, _LONG, 1, _SIDE),
            (279, _LONG, 1, len(_SENSOR)),
            (33421, _SHORT, 2, struct.pack("<2H", 2, 2)),
            (33422, _BYTE, 4, b"\0\1\1\2"),
            (50717, _LONG, 1, 65535),
        ],
        at,
    )


def _directory(entries: list[_Entry], at: int) -> bytes:
    body, extra = b"", b""
    end = at + 2 + 12 * len(entries) + 4
    for tag, kind, count, given in sorted(entries):
        if isinstance(given, int):
            given = struct.pack("<H" if kind == _SHORT else "<I", given)
        if len(given) > 4:
            place = end + len(extra)
            extra += given + b"\0" * (len(given) % 2)
            given = struct.pack("<I", place)
        body += struct.pack("<HHI", tag, kind, count) + given.ljust(4, b"\0")
    return struct.pack("<H", len(entries)) + body + bytes(4) + extra
