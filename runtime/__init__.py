"""The runtime for devices: load a bundle and compute embeddings, labels and search hits, no torch.

Importing it switches off the telemetry of other packages (`telemetry.py`), and nothing else.
The public names below are imported on first use, so that importing this package costs nothing.
None of them is named like a module of this package: importing that module would replace it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from edgeclip.runtime import telemetry as _telemetry

if TYPE_CHECKING:
    from edgeclip.runtime.bundle.bundle import Bundle
    from edgeclip.runtime.bundle.index import Hit, Index, LabelSet
    from edgeclip.runtime.bundle.manifest import Manifest
    from edgeclip.runtime.encoder import Encoder, LabelScore
    from edgeclip.runtime.errors import (
        BundleError,
        ConfigError,
        EdgeClipError,
        EngineError,
        InputError,
        MissingExtraError,
        SpaceMismatchError,
    )
    from edgeclip.runtime.inputs.preprocess import crop_batch
    from edgeclip.runtime.inputs.tokenizer import TextTokenizer
    from edgeclip.runtime.quality.relevance import Relevance
    from edgeclip.runtime.quality.retrieval import retrieval, zero_shot
    from edgeclip.runtime.spec import EncoderSpec, ImageSpec, TextSpec

_telemetry.switch_off()

__all__ = [
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
    "LabelScore",
    "LabelSet",
    "Manifest",
    "MissingExtraError",
    "Relevance",
    "SpaceMismatchError",
    "TextSpec",
    "TextTokenizer",
    "crop_batch",
    "retrieval",
    "zero_shot",
]

_MODULES = {
    "bundle.bundle": ("Bundle",),
    "bundle.index": ("Hit", "Index", "LabelSet"),
    "bundle.manifest": ("Manifest",),
    "encoder": ("LabelScore", "Encoder"),
    "errors": (
        *("BundleError", "ConfigError", "EdgeClipError", "EngineError", "InputError"),
        *("MissingExtraError", "SpaceMismatchError"),
    ),
    "inputs.preprocess": ("crop_batch",),
    "inputs.tokenizer": ("TextTokenizer",),
    "quality.relevance": ("Relevance",),
    "quality.retrieval": ("retrieval", "zero_shot"),
    "spec": ("EncoderSpec", "ImageSpec", "TextSpec"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
