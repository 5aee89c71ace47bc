"""The embedded runtime: a bundle in, embeddings and answers out, without torch.

The public names are resolved on first use, so that importing this package costs nothing.
A function that is named like its module (`load_image`, `preprocess`) cannot be one of them:
importing the module puts the module in its place.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeclip.runtime.bundle import Bundle
    from edgeclip.runtime.encoder import Answer, Encoder
    from edgeclip.runtime.errors import (
        BundleError,
        ConfigError,
        EdgeClipError,
        EngineError,
        InputError,
        MissingExtraError,
        SpaceMismatchError,
    )
    from edgeclip.runtime.index import Hit, Index
    from edgeclip.runtime.labels import LabelSet
    from edgeclip.runtime.manifest import Manifest
    from edgeclip.runtime.preprocess import crop_batch
    from edgeclip.runtime.quality import retrieval, zero_shot
    from edgeclip.runtime.spec import EncoderSpec, ImageSpec, TextSpec
    from edgeclip.runtime.tokenize_text import TextTokenizer

__all__ = [
    "Answer",
    "Bundle",
    "BundleError",
    "ConfigError",
    "EdgeClipError",
    "Encoder",
    "EncoderSpec",
    "EngineError",
    "Hit",
    "ImageSpec",
    "Index",
    "InputError",
    "LabelSet",
    "Manifest",
    "MissingExtraError",
    "SpaceMismatchError",
    "TextSpec",
    "TextTokenizer",
    "crop_batch",
    "retrieval",
    "zero_shot",
]

_MODULES = {
    "bundle": ("Bundle",),
    "encoder": ("Answer", "Encoder"),
    "errors": (
        *("BundleError", "ConfigError", "EdgeClipError", "EngineError", "InputError"),
        *("MissingExtraError", "SpaceMismatchError"),
    ),
    "index": ("Hit", "Index"),
    "labels": ("LabelSet",),
    "manifest": ("Manifest",),
    "preprocess": ("crop_batch",),
    "quality": ("retrieval", "zero_shot"),
    "spec": ("EncoderSpec", "ImageSpec", "TextSpec"),
    "tokenize_text": ("TextTokenizer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
