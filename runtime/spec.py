"""The input and output contract of a dual encoder: image size, tokens, names of tensors."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeclip.runtime.errors import InputError

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Tower = Literal["image", "text"]
Precision = Literal["fp32", "fp16", "int8", "fp8"]

PixelForm = Literal["uint8-nhwc", "float32-nchw"]

# The two forms of an image tower's input: cropped pixels uint8 [N, size, size, 3], which the graph
# normalises; or normalised pixels float32 [N, 3, size, size].
PIXEL_INPUTS: dict[PixelForm, str] = {"uint8-nhwc": "pixels", "float32-nchw": "pixel_values"}
TEXT_INPUT = "input_ids"
# The names that transformers.js and optimum use.
OUTPUT_NAMES: dict[Tower, str] = {"image": "image_embeds", "text": "text_embeds"}
PATCH_OUTPUT = "patch_features"  # float32 [N, rows, columns, width]
LABEL_OUTPUTS = ("label_index", "label_score")  # int64 [N], float32 [N]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """How an image is preprocessed for the image tower.

    The shortest edge is resized to `resize` pixels, the centre `size` x `size` is cropped,
    values are scaled to [0, 1] and normalised by `mean` and `std` (RGB). With `stretch` the whole
    image is resized to `resize` x `resize` instead, as SigLIP does.
    """

    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    stretch: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"need 0 < size <= resize, got {self.size} and {self.resize}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """How a text is tokenized for the text tower: at most `context_length` token ids.

    `bos_id` and `eos_id` are None where a tower's texts have no start or no end token. With
    `pad_to_context` every text is padded to the whole context, which the tower was trained to see.
    """

    context_length: int
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    pad_to_context: bool = False

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and behind those of a text."""
        before, behind = (() if id is None else (id,) for id in (self.bos_id, self.eos_id))
        return before, behind


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """Input contract and embedding size of a dual encoder.

    `dim` is the length of an embedding; both towers return L2-normalised float32 rows.
    `logit_scale` multiplies a cosine to give a logit (CLIP's exp(temperature)).
    """

    dim: int
    image: ImageSpec
    text: TextSpec
    logit_scale: float


def plain_spec(spec: EncoderSpec | ImageSpec | TextSpec) -> dict[str, Any]:
    """Return a spec as plain data, `stretch` and `pad_to_context` only where they are set.

    So older releases, which do not know them, read what has no use for them.
    """
    if isinstance(spec, EncoderSpec):
        parts = {"image": plain_spec(spec.image), "text": plain_spec(spec.text)}
        return asdict(spec) | parts
    return {
        name: value
        for name, value in asdict(spec).items()
        if value or name not in ("stretch", "pad_to_context")
    }


def as_text_list(texts: str | Iterable[str], what: str = "texts") -> list[str]:
    """Return one text or several as a list; its items are not checked.

    Raises:
        InputError: something else, or a set or dict, whose order says nothing. `what` names it.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | bytearray | memoryview | set | frozenset | dict):
        raise InputError(f"{what} are {type(texts).__name__}: give a str or a list of str")
    try:
        return list(texts)
    except TypeError:
        raise InputError(
            f"{what} are {type(texts).__name__}: give a str or a list of str"
        ) from None
