"""Arrays with a description in one npz file: no pickle, written whole or not at all.

The description is JSON kept as bytes in the array `meta`, because numpy's own text
arrays drop trailing null characters and grow with the longest text.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.files import atomic_file

_META = "meta"


def write_npz(
    path: Path, kind: str, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write arrays and their description; an existing file is replaced in one step.

    Args:
        path: the file to make; its folder is made where it is missing.
        kind: what the file is, such as "edgeclip-index-1"; `read_npz` wants the same.
        meta: plain JSON data.
        arrays: numeric arrays by name; not "meta".

    Raises:
        InputError: the file cannot be written.
    """
    if _META in arrays or any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("arrays must be numeric, and none may be called 'meta'")
    text = json.dumps({"kind": kind, **meta}, ensure_ascii=False, allow_nan=False)
    described = {_META: np.frombuffer(text.encode(), dtype=np.uint8), **arrays}
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **cast("Mapping[str, Any]", described))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def read_npz(
    path: Path, kind: str, meta_keys: frozenset[str], array_keys: frozenset[str]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read what `write_npz` wrote: the description without its kind, and the arrays.

    Raises:
        InputError: missing or damaged file, another kind, or other keys than the given.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path")
    try:
        arrays = _read_arrays(path)
        meta = json.loads(arrays.pop(_META).tobytes())
    except Exception as error:  # zip and numpy raise many kinds on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is damaged or not EdgeCLIP's ({reason}): make it again"
        ) from error
    found = meta.pop("kind", None) if isinstance(meta, dict) else None
    if found != kind:
        raise InputError(f"{path} is of kind {found!r}, expected {kind!r}")
    for wanted, got in ((meta_keys, frozenset(meta)), (array_keys, frozenset(arrays))):
        if wanted != got:
            raise InputError(
                f"{path} is not a whole {kind}: missing keys {sorted(wanted - got)}, "
                f"unknown keys {sorted(got - wanted)}"
            )
    return meta, arrays


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # Nothing here is compressed: a small file cannot unpack to a huge one.
            if entry.compress_type != zipfile.ZIP_STORED or not entry.filename.endswith(".npy"):
                raise ValueError(f"unexpected entry {entry.filename!r}")
            name = entry.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"entry {name!r} comes twice")
            with archive.open(entry) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                # Reading to the very end is what checks the checksum.
                if stream.read(1):
                    raise ValueError(f"entry {name!r} is longer than its array")
    return arrays
