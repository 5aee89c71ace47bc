"""Quantization configs: a precision with all its settings, as plain data.

A `Config` holds everything that `quantize_graph` needs beside the graph and the calibration
data, so its `key` identifies a result: the same source, data and key give the same file.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, overload

from pydantic import Discriminator

from edgeclip.export.quantizing.activation_ranges import EXTREMES, Ranging
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.spec import Precision

NodeNames = tuple[str, ...]  # names of nodes that stay in float
SmoothingAlphas = tuple[
    tuple[str, float], ...
]  # LayerNorm node, and how much of its range it hands on


@dataclass(frozen=True, slots=True, kw_only=True)
class Float32:
    """fp32, as the exporter writes it: the reference."""

    kind: Literal["fp32"] = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Float16:
    """Weights and arithmetic in fp16, typed by casts in the graph.

    Attributes:
        islands: nodes that stay in fp32, beside those beyond the range of fp16.

    Raises:
        ValueError: an empty or duplicate name.
    """

    kind: Literal["fp16"] = "fp16"
    islands: NodeNames = ()

    def __post_init__(self) -> None:
        _raise_if_any(_name_mistakes("islands", self.islands))


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticInt8:
    """Static int8: Q/DQ around products with constant weights, ranges from calibration.

    Attributes:
        symmetric: activations are signed with zero point 0 and biases stay float, as
            TensorRT needs them. On a CPU, unsigned and asymmetric activations are faster.
        reduce_range: weights take 7 bits, because 8-bit products can saturate on a CPU
            without int8 dot products.
        per_channel: weights have one scale for each output channel, not one for all.
        ranging: how the range of an activation follows from what calibration saw.
        kept: nodes that stay in float.
        smoothing: LayerNorms whose outliers move into the weights behind them (SmoothQuant),
            each with its alpha, from 0 (the activations keep them) to 1 (the weights take all).
        float_precision: precision of everything that is not int8.
        int8_tables: token tables are stored in int8 too, with a scale for each row.

    Raises:
        ValueError: settings that exclude each other, duplicate or empty names, alphas out of
            range; all of them in one message.
    """

    kind: Literal["static-int8"] = "static-int8"
    symmetric: bool
    reduce_range: bool = False
    per_channel: bool = True
    ranging: Ranging = EXTREMES
    kept: NodeNames = ()
    smoothing: SmoothingAlphas = ()
    float_precision: Literal["fp32", "fp16"] = "fp32"
    int8_tables: bool = False

    def __post_init__(self) -> None:
        mistakes = _name_mistakes("kept", self.kept)
        mistakes += _name_mistakes("smoothing", [name for name, _ in self.smoothing])
        mistakes += [
            f"smoothing: alpha of {name} must be from 0 to 1, got {alpha}"
            for name, alpha in self.smoothing
            if not 0 <= alpha <= 1
        ]
        if self.symmetric and self.reduce_range:
            mistakes.append("reduce_range is for asymmetric int8, which runs on CPUs")
        if self.symmetric and self.int8_tables:
            mistakes.append("int8_tables is for asymmetric int8, which runs on CPUs")
        if not self.symmetric and self.float_precision != "fp32":
            mistakes.append("asymmetric int8 runs on CPUs: its float_precision must be fp32")
        _raise_if_any(mistakes)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicInt8:
    """Dynamic int8: the range of activations is found in every call, over the whole batch.

    An embedding then depends on what else is in its batch, so this is never a default.

    Attributes:
        reduce_range: weights take 7 bits, see `StaticInt8`.
        kept: nodes that stay in float.
        int8_tables: token tables are stored in int8 too, with a scale for each row.

    Raises:
        ValueError: an empty or duplicate name.
    """

    kind: Literal["dynamic-int8"] = "dynamic-int8"
    reduce_range: bool = False
    kept: NodeNames = ()
    int8_tables: bool = False

    def __post_init__(self) -> None:
        _raise_if_any(_name_mistakes("kept", self.kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnly:
    """Weights stored in 4 or 8 bits, float activations: for size, not for speed.

    Attributes:
        bits: number of bits of a product's weight. The last product and token tables take 8 bits.
        block: how many weights of one output channel share a scale.
        kept: nodes that stay in float; a token table is kept by naming its Gather.

    Raises:
        ValueError: unknown bits or block size, an empty or duplicate name.
    """

    kind: Literal["weight-only"] = "weight-only"
    bits: Literal[4, 8]
    block: Literal[32, 64, 128] = 32
    kept: NodeNames = ()

    def __post_init__(self) -> None:
        mistakes = _name_mistakes("kept", self.kept)
        if self.bits not in (4, 8):
            mistakes.append(f"bits must be 4 or 8, got {self.bits}")
        if self.block not in (32, 64, 128):
            mistakes.append(f"block must be 32, 64 or 128, got {self.block}")
        _raise_if_any(mistakes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """float8 (E4M3) Q/DQ around products with constant weights, everything else in fp16.

    Attributes:
        kept: nodes that are not quantized.

    Raises:
        ValueError: an empty or duplicate name.
    """

    kind: Literal["fp8"] = "fp8"
    kept: NodeNames = ()

    def __post_init__(self) -> None:
        _raise_if_any(_name_mistakes("kept", self.kept))


# In a file, `kind` says which of them it is.
Config = Annotated[
    Float32 | Float16 | StaticInt8 | DynamicInt8 | WeightOnly | Float8, Discriminator("kind")
]


@dataclass(frozen=True, slots=True)
class _Holder:
    config: Config


def precision_of(config: Config) -> Precision:
    """Return the precision that a bundle's files and gates have for a config.

    Everything that stores weights as integers is int8 there, 4-bit weights too.
    """
    match config:
        case Float32():
            return "fp32"
        case Float16():
            return "fp16"
        case Float8():
            return "fp8"
        case StaticInt8() | DynamicInt8() | WeightOnly():
            return "int8"


def needs_vnni(config: Config) -> bool:
    """Return whether its int8 products overflow on a CPU without VNNI."""
    match config:
        case StaticInt8():
            return not config.symmetric and not config.reduce_range
        case DynamicInt8():
            return not config.reduce_range
        case _:
            return False


@overload
def default_config(precision: Literal["int8"], device: DeviceProfile) -> StaticInt8: ...


@overload
def default_config(precision: Precision, device: DeviceProfile) -> Config: ...


def default_config(precision: Precision, device: DeviceProfile) -> Config:
    """Return the config for a precision on a device where nothing was searched."""
    match precision:
        case "fp32":
            return Float32()
        case "fp16":
            return Float16()
        case "fp8":
            return Float8()
        case "int8" if device.on_cpu:
            return StaticInt8(symmetric=False, reduce_range=not device.vnni)
        case "int8":
            return StaticInt8(symmetric=True, float_precision="fp16")


def describe(config: Config) -> str:
    """Describe a config, as in "int8, symmetric, fp16 between, 2 nodes in float"."""
    match config:
        case Float32():
            return "fp32"
        case Float16():
            return _joined("fp16", _count(config.islands, "node", "in fp32"))
        case StaticInt8():
            return _joined("int8", *_static_words(config), _in_float(config.kept))
        case DynamicInt8():
            return _joined(
                "dynamic int8",
                "7-bit weights" if config.reduce_range else "",
                "int8 tables" if config.int8_tables else "",
                _in_float(config.kept),
            )
        case WeightOnly():
            words = f"{config.bits}-bit weights", f"blocks of {config.block}"
            return _joined(*words, _in_float(config.kept))
        case Float8():
            return _joined("fp8", _in_float(config.kept))


def key(config: Config) -> str:
    """Return the SHA-256 of a config's canonical JSON; the order of names does not matter."""
    # Read again, so that 1 and 1.0 are the same number.
    data = asdict(config_from_data(asdict(config), source="config"))
    for name in ("kept", "islands", "smoothing"):
        if name in data:
            data[name] = sorted(data[name])
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_from_data(data: object, *, source: str) -> Config:
    """Read a config from plain data; `source` names it in messages.

    Raises:
        ConfigError: an unknown kind, a remedy that was removed, or any mistake that `parse` finds.
    """
    return parse(_Holder, {"config": without_removed(data, source=source)}, source=source).config


# Fields of static int8 in older files, each with the value that has no effect.
_REMOVED: dict[str, object] = {"equalised": False, "bias_corrected": False}


def without_removed(data: object, *, source: str) -> object:
    """Drop the fields that older versions wrote from a config's plain data.

    Raises:
        ConfigError: the config uses one of them, so its graph can no longer be made.
    """
    if not isinstance(data, dict) or data.get("kind") != "static-int8":
        return data
    used = [name for name, unused in _REMOVED.items() if data.get(name, unused) != unused]
    ranging = data.get("ranging")
    if isinstance(ranging, dict) and ranging.get("method") in ("entropy", "mse"):
        used.append(f"ranges by {ranging['method']}")
    if used:
        raise ConfigError(
            f"{source} uses {', '.join(used)}, which this version of edgeclip no longer has: "
            "search again with `edgeclip quantize`"
        )
    return {name: value for name, value in data.items() if name not in _REMOVED}


def _name_mistakes(field: str, names: Sequence[str]) -> list[str]:
    mistakes = [f"{field}: a name is empty"] if not all(names) else []
    twice = sorted({name for name in names if names.count(name) > 1})
    return mistakes + [f"{field}: {name} is there twice" for name in twice]


def _raise_if_any(mistakes: Sequence[str]) -> None:
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _static_words(config: StaticInt8) -> list[str]:
    method: str = config.ranging.method
    if method == "percentile":
        method = f"percentile {config.ranging.percentile:g}"
    return [
        "symmetric" if config.symmetric else "asymmetric",
        "7-bit weights" if config.reduce_range else "",
        "" if config.per_channel else "one scale for each weight",
        "" if config.ranging == EXTREMES else f"ranges by {method}",
        _count(config.smoothing, "LayerNorm", "smoothed"),
        "fp16 between" if config.float_precision == "fp16" else "",
        "int8 tables" if config.int8_tables else "",
    ]


def _in_float(kept: NodeNames) -> str:
    return _count(kept, "node", "in float")


def _count(items: Sequence[object], what: str, how: str) -> str:
    return f"{len(items)} {what}{'s' if len(items) > 1 else ''} {how}" if items else ""


def _joined(*words: str) -> str:
    return ", ".join(word for word in words if word)
