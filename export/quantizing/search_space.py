"""What is worth trying for a tower on a device: one int8 recipe to refine, and the other forms."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeclip.export.activation_bounds import Ranging
from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    StaticInt8,
    WeightOnly,
    default_config,
)
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.spec import Tower

Change = Callable[[StaticInt8], StaticInt8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Configs to try.

    Attributes:
        recipe: static int8 with everything quantized, as it suits the engine; None where the
            device has no int8.
        remedies: changes of the recipe that cost no time on the device; they are tried one
            after another where it misses its gates.
        smoothing: whether LayerNorms may be smoothed, before all other remedies.
        cheaper: changes that may save some time or bytes and lose some quality; they are tried
            one by one where the recipe is inside its gates.
        others: configs of other kinds, tried as they are.
    """

    recipe: StaticInt8 | None
    remedies: tuple[Change, ...] = ()
    smoothing: bool = True
    cheaper: tuple[Change, ...] = ()
    others: tuple[Config, ...] = ()


def space_for(
    device: DeviceProfile, tower: Tower, *, here: bool, dynamic: bool = False
) -> SearchSpace:
    """Return what suits a device's engine.

    Args:
        device: the tower runs on it.
        tower: which one; weights alone are only quantized for texts, whose table is large.
        here: whether this machine is the device, so that what costs time shows.
        dynamic: try dynamic int8 too, whose embeddings depend on what else is in a batch.
    """
    others: list[Config] = []
    if "fp16" in device.precisions:
        others.append(Float16())
    if "fp8" in device.precisions:
        others.append(Float8())
    if "int8" not in device.precisions:
        return SearchSpace(recipe=None, others=tuple(others))
    recipe = default_config("int8", device)
    cheaper: list[Change] = []
    if here and device.on_cpu:
        cheaper.append(_one_scale)
        if recipe.reduce_range:
            cheaper.append(_full_range)  # whether products saturate shows in the gates
    if device.on_cpu and tower == "text":
        cheaper.append(_small_tables)
    if device.on_cpu and dynamic:
        others.append(DynamicInt8(reduce_range=recipe.reduce_range))
    if device.on_cpu and tower == "text":
        others += [WeightOnly(bits=8), WeightOnly(bits=4)]
    return SearchSpace(
        recipe=recipe,
        remedies=(_percentile, _least_error, _equalised, _corrected),
        cheaper=tuple(cheaper),
        others=tuple(others),
    )


def _percentile(config: StaticInt8) -> StaticInt8:
    return replace(config, ranging=Ranging(method="percentile", percentile=99.99))


def _least_error(config: StaticInt8) -> StaticInt8:
    return replace(config, ranging=Ranging(method="mse"))


def _equalised(config: StaticInt8) -> StaticInt8:
    return replace(config, equalised=True)


def _corrected(config: StaticInt8) -> StaticInt8:
    return replace(config, bias_corrected=True)


def _one_scale(config: StaticInt8) -> StaticInt8:
    return replace(config, per_channel=False)


def _full_range(config: StaticInt8) -> StaticInt8:
    return replace(config, reduce_range=False)


def _small_tables(config: StaticInt8) -> StaticInt8:
    return replace(config, int8_tables=True)
