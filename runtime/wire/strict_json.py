"""The JSON part of an Open Inference Protocol message, read with suspicion.

Each function takes what the parser gave and returns it with a type, or raises `WireError`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from edgeclip.runtime.wire.tensors import Shape, WireError

Parameter = str | int | float | bool

_INT64 = 2**63
_SHOWN = 40  # characters of a wrong value that a message quotes


def parse_object(text: memoryview) -> dict[str, Any]:
    """Read one JSON object: strict UTF-8, no key twice, no NaN.

    Raises:
        WireError: anything else, also nesting too deep for the parser.
    """
    try:
        # str() first: json.loads would guess UTF-16 and UTF-32.
        found = json.loads(str(text, "utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise WireError("the JSON is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, and a number of too many digits
        raise WireError(f"the JSON cannot be read: {str(error)[:120]}") from None
    if not isinstance(found, dict):
        raise WireError("the JSON must be an object")
    return found


def get_text(source: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """Return a text; `default` where the key is missing.

    Raises:
        WireError: another type, or missing without a default.
    """
    found = source.get(key, default)
    if not isinstance(found, str):
        raise WireError(f"{key} must be a text{_instead(source, key)}")
    return found


def get_objects(source: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return a list of objects; an empty one where the key is missing.

    Raises:
        WireError: something else.
    """
    found = source.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise WireError(f"{key} must be a list of objects")
    return found


def get_shape(source: Mapping[str, Any]) -> Shape:
    """Return the `shape` of a tensor.

    Raises:
        WireError: not a list of whole numbers from 0.
    """
    found = source.get("shape")
    # type() and not isinstance(): True is an int.
    if not isinstance(found, list) or any(type(size) is not int or size < 0 for size in found):
        raise WireError(f"shape must be a list of whole numbers{_instead(source, 'shape')}")
    return tuple(found)


def get_parameters(source: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return `parameters`: texts, finite numbers (whole ones within int64) and booleans.

    Raises:
        WireError: something else.
    """
    found = source.get("parameters", {})
    if not isinstance(found, dict):
        raise WireError("parameters must be an object")
    for key, value in found.items():
        if not _is_parameter(value):
            raise WireError(
                f"parameter {_quote(key)} must be a text, number or boolean, not {_quote(value)}"
            )
    return found


def take_size(parameters: dict[str, Parameter]) -> int | None:
    """Take `binary_data_size` out of a tensor's parameters; None where it is missing.

    Raises:
        WireError: not a whole number from 0.
    """
    found = parameters.pop("binary_data_size", None)
    if found is None:
        return None
    if type(found) is not int or found < 0:
        raise WireError(f"binary_data_size must be a whole number from 0, not {_quote(found)}")
    return found


def get_flag(parameters: Mapping[str, Parameter], key: str, default: bool) -> bool:
    """Return a boolean parameter.

    Raises:
        WireError: something other than true or false.
    """
    found = parameters.get(key, default)
    if not isinstance(found, bool):
        raise WireError(f"{key} must be true or false, not {_quote(found)}")
    return found


def get_number(parameters: Mapping[str, Parameter], key: str) -> float | None:
    """Return a parameter as a float; None where it is missing.

    Raises:
        WireError: not a number.
    """
    found = parameters.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise WireError(f"{key} must be a number, not {_quote(found)}")
    return float(found)


def _is_parameter(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -_INT64 <= value < _INT64
    return isinstance(value, str)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _instead(source: Mapping[str, Any], key: str) -> str:
    return f", not {_quote(source[key])}" if key in source else ", and is missing"


def _quote(value: object) -> str:
    if isinstance(value, int | float | str | bool) or value is None:
        shown = value[: _SHOWN + 1] if isinstance(value, str) else str(value)
        return repr(shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}...")
    return type(value).__name__
