"""Define a quantization search: tower, device, data, and the configs to try."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, Bounds
from edgeclip.export.gates.zero_shot import SubsetSource, ZeroShotSet
from edgeclip.export.graph.calibration import FEWEST_PAIRS, CalibrationSource
from edgeclip.export.graph.embedders import TowerGraph, judging_device
from edgeclip.export.graph.graph_io import sha256_graph
from edgeclip.export.quantizing.activation_ranges import Ranging
from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    StaticInt8,
    WeightOnly,
    default_config,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import MaxBad
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.stats.clusters import Clusters

MAX_TEST_JUDGEMENTS = 3  # candidates that a search may judge on the test pairs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedPairs:
    """Pairs that configs are judged on, with labelled pictures where there are any.

    Attributes:
        pairs: with captions.
        zero_shot: labelled pictures; None where no picture has a label.
        clusters: integers, equal for pictures that belong together; None where all are independent.
    """

    pairs: Source
    zero_shot: ZeroShotSet | None = None
    clusters: Clusters | None = None

    @property
    def identity(self) -> str:
        """A string that changes whenever a pair or a label does."""
        zero = self.zero_shot
        labels = "" if zero is None else f"{zero.source.identity}:{zero.labels.names}"
        together = "" if self.clusters is None else self.clusters.tobytes().hex()
        return f"{self.pairs.identity}:{labels}:{together}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchTask:
    """A tower, its target device, and the data that configs are judged on.

    Attributes:
        student: the model; it is put into evaluation mode.
        graph: one of its towers in fp32, as it will be shipped.
        device: the target device.
        ranges: pairs that calibration ranges are found on.
        steering: held-out pairs of the same split, which decide what is tried next.
        test: pairs of another split, for the final judgement only.
        bounds: bounds of the gates of each precision.
        workload: how candidates are timed; None where this machine is not the device.
    """

    student: DualEncoder
    graph: TowerGraph
    device: DeviceProfile
    ranges: Source
    steering: JudgedPairs
    test: JudgedPairs
    bounds: Mapping[Precision, Bounds] = field(default_factory=lambda: DEFAULT_BOUNDS)
    workload: Workload | None = None

    @property
    def judging_device(self) -> DeviceProfile:
        """The device profile that runs graphs while they are judged."""
        return judging_device(self.device)

    @property
    def tower(self) -> Tower:
        """The searched tower."""
        return self.graph.tower

    @property
    def identity(self) -> str:
        """A hash of everything beside the config that a measurement depends on."""
        machine = detect_machine()
        here = (machine.cpu, machine.cores) if self.workload is not None else ()
        parts = (
            sha256_graph(self.graph.path),
            self.tower,
            self.student.spec,
            space_fingerprint(self.student),  # of the other tower
            self.ranges.identity,
            self.steering.identity,
            sorted((name, asdict(bounds)) for name, bounds in self.bounds.items()),
            asdict(self.device),
            self.workload,
            here,
            machine.packages,
        )
        return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def open_calibration(
    data: str,
    *,
    pairs: int,
    ranges: int,
    size: int,
    strict: bool = False,
    max_bad: MaxBad | None = None,
) -> tuple[Source, Source]:
    """Open calibration pairs, split into those to find ranges on and those to steer by.

    Args:
        data: emoji, or a folder; see `open_source`.
        pairs: how many emoji scenes in all.
        ranges: how many to find ranges on; at most half of what there is.
        size: side of a picture in pixels.
        strict, max_bad: see `open_source`.

    Raises:
        ConfigError: there are too few.
        InputError: see `open_source`.
    """
    source = open_source(
        data, split="calibration", count=pairs, size=size, strict=strict, max_bad=max_bad
    )
    if len(source) < 2 * FEWEST_PAIRS:
        raise ConfigError(
            f"{source.name}: give at least {2 * FEWEST_PAIRS} pairs to calibrate on, half of which "
            "are held out to compare configs on"
        )
    found, steering = split_calibration(source, min(ranges, len(source) // 2))
    return CalibrationSource(found), steering


def split_calibration(source: Source, ranges: int) -> tuple[Source, Source]:
    """Split calibration pairs at random: `ranges` to find ranges on, the others to steer by.

    The split is random because folders are often sorted by what they show.
    """
    drawn = np.random.default_rng(0).permutation(len(source))
    first, rest = (sorted(map(int, part)) for part in (drawn[:ranges], drawn[ranges:]))
    name = source.name
    return (
        SubsetSource(source, first, f"{len(first)} of {name}"),
        SubsetSource(source, rest, f"{len(rest)} others of {name}"),
    )


Change = Callable[[StaticInt8], StaticInt8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The configs that a search tries.

    Attributes:
        recipe: static int8 with every product quantized, as the engine needs it; None where the
            device has no int8.
        remedies: changes of the recipe that cost no time on the device; tried one after another
            while it misses its gates.
        smoothing: try SmoothQuant, before all other remedies.
        cheaper: changes that may save time or bytes and lose quality; tried one by one where the
            recipe is inside its gates.
        others: configs of other kinds, tried as they are.
    """

    recipe: StaticInt8 | None
    remedies: tuple[Change, ...] = ()
    smoothing: bool = True
    cheaper: tuple[Change, ...] = ()
    others: tuple[Config, ...] = ()


def search_space(
    device: DeviceProfile, tower: Tower, *, here: bool, dynamic: bool = False
) -> SearchSpace:
    """Return the configs worth trying on a device.

    Args:
        device: the target device.
        tower: which one; weight-only configs are only for texts, whose token table is large.
        here: whether this machine is the device, so that time is measured.
        dynamic: try dynamic int8 too, whose embeddings depend on the rest of their batch.
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
        remedies=(_percentile,),
        cheaper=tuple(cheaper),
        others=tuple(others),
    )


def _percentile(config: StaticInt8) -> StaticInt8:
    return replace(config, ranging=Ranging(method="percentile", percentile=99.99))


def _one_scale(config: StaticInt8) -> StaticInt8:
    return replace(config, per_channel=False)


def _full_range(config: StaticInt8) -> StaticInt8:
    return replace(config, reduce_range=False)


def _small_tables(config: StaticInt8) -> StaticInt8:
    return replace(config, int8_tables=True)
