"""Where things lie in a bundle, and which paths a manifest may name."""

from edgeclip.runtime.spec import PixelForm, Precision, Tower

MANIFEST_NAME = "edgeclip.json"
TOKENIZER_NAME = "tokenizer.json"
GOLDEN_NAME = "golden.npz"


def tower_path(
    tower: Tower, precision: Precision, pixels: PixelForm | None = "float32-nchw"
) -> str:
    """Return the path of a tower in a bundle.

    Graphs in the customary form are named as transformers.js and optimum name them; an image
    tower that takes uint8 pixels would not run there, and has a name of its own.
    """
    stem = "text_model"
    if tower == "image":
        stem = "vision_device" if pixels == "uint8-nhwc" else "vision_model"
    return f"onnx/{stem}{'' if precision == 'fp32' else '_' + precision}.onnx"


def labels_path(name: str) -> str:
    """Return the path of a label set in a bundle."""
    return f"labels/{name}.npz"


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
