"""Where things lie in a bundle, and which paths a manifest may name."""

from edgeclip.runtime.spec import Precision, Tower

MANIFEST_NAME = "edgeclip.json"
TOKENIZER_NAME = "tokenizer.json"
GOLDEN_NAME = "golden.npz"


def tower_path(tower: Tower, precision: Precision) -> str:
    """Return the path of a tower in a bundle, as transformers.js and optimum name it."""
    stem = "vision_model" if tower == "image" else "text_model"
    return f"onnx/{stem}{'' if precision == 'fp32' else '_' + precision}.onnx"


def check_path(path: str) -> None:
    """Refuse any path that is not plain, relative and inside the bundle.

    Raises:
        ValueError: absolute, with `..`, a backslash, a drive, a control character or an
            empty part, or the manifest itself.
    """
    parts = path.split("/")
    plain = path.isprintable() and not {"\\", ":"} & set(path)
    if not plain or not all(parts) or {".", ".."} & set(parts):
        raise ValueError(f"unsafe path {path!r}: give a plain POSIX path inside the bundle")
    if path.casefold() == MANIFEST_NAME:
        raise ValueError(f"{MANIFEST_NAME} cannot list itself")
