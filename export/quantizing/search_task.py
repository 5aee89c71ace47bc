"""What is searched: a tower, the device that it is for, and the data that decide."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from edgeclip.compress.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.sources import Source, open_source
from edgeclip.export.calibrate import FEWEST, CalibrationSource
from edgeclip.export.embed_pairs import runner_of
from edgeclip.export.gates import DEFAULT_BOUNDS, Bounds
from edgeclip.export.graph import sha256_graph
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.export.zero_shot import Chosen, ZeroShot
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.machine import detect_machine
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.spec import Precision, Tower


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JudgedPairs:
    """Pairs that configs are judged on.

    Attributes:
        pairs: with captions.
        zero_shot: labelled pictures; None where no picture has a label.
    """

    pairs: Source
    zero_shot: ZeroShot | None = None

    @property
    def identity(self) -> str:
        """Changes whenever a pair or a label does."""
        zero = self.zero_shot
        labels = "" if zero is None else f"{zero.source.identity}:{zero.labels.names}"
        return f"{self.pairs.identity}:{labels}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchTask:
    """A tower, the device that it is for, and the data that decide.

    Attributes:
        student: the model; it is put into evaluation mode.
        graph: one of its towers in fp32, as it will be shipped.
        device: that it is for.
        ranges: pairs that ranges are found on.
        steering: held-out pairs of the same split, which decide what is tried next.
        test: pairs of another split, for the last judgement only.
        bounds: of the gates of each precision.
        workload: how points are timed on this machine; None where it is not the device.
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
    def runner(self) -> DeviceProfile:
        """What runs graphs while they are judged: the device, if it is a CPU."""
        return runner_of(self.device)

    @property
    def tower(self) -> Tower:
        """Which one is searched."""
        return self.graph.tower

    @property
    def identity(self) -> str:
        """Everything beside the config that a point depends on."""
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


def open_calibration(data: str, *, pairs: int, ranges: int, size: int) -> tuple[Source, Source]:
    """Open calibration pairs in two parts: those to find ranges on, and those to steer by.

    Args:
        data: emoji, or a folder; see `open_source`.
        pairs: how many emoji scenes in all.
        ranges: how many to find ranges on; at most half of what there is.
        size: of a picture, in pixels.

    Raises:
        ConfigError: there are too few.
        InputError: see `open_source`.
    """
    source = open_source(data, split="calibration", count=pairs, size=size)
    if len(source) < 2 * FEWEST:
        raise ConfigError(
            f"{source.name}: give at least {2 * FEWEST} pairs to calibrate on, half of which are "
            "held out to compare configs on"
        )
    found, steering = split_calibration(source, min(ranges, len(source) // 2))
    return CalibrationSource(found), steering


def split_calibration(source: Source, ranges: int) -> tuple[Source, Source]:
    """Split calibration pairs in two: `ranges` of them to find ranges on, the others to steer by.

    Which is which is drawn, because folders are often sorted by what they show.
    """
    drawn = np.random.default_rng(0).permutation(len(source))
    first, rest = (sorted(map(int, part)) for part in (drawn[:ranges], drawn[ranges:]))
    name = source.name
    return (
        Chosen(source, first, f"{len(first)} of {name}"),
        Chosen(source, rest, f"{len(rest)} others of {name}"),
    )
