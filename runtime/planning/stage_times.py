"""Samples of how long each stage of every plan takes on one machine.

Samples, because medians cannot be added up to a 95th percentile: the planner draws from them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.spec import Precision

StageKind = Literal["prepare", "head", "encode", "compress", "open", "decode", "tail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStage:
    """One stage of the computation from a picture to its embedding.

    Attributes:
        kind: "prepare" turns a file into pixels, "head" pixels into the value at a cut,
            "encode" that into a request's body; "compress" turns a file into what an image
            codec sends. On the server "open" turns a picture sent by an image codec into
            pixels, "decode" a request's body into the value at a cut, "tail" that into an
            embedding; tail 0 is the whole tower.
        cut: number of the cut; for head, encode, decode and tail.
        codec: name of the codec; for encode, decode, compress and open.
    """

    kind: StageKind
    cut: int | None = None
    codec: str | None = None

    def __str__(self) -> str:
        parts = (self.kind, self.cut, self.codec)
        return " ".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSamples:
    """Wall time of a stage at batch 1, in milliseconds, one value per round.

    `joules` is the energy of one run, of all that the sensor covers; None without a sensor.
    """

    stage: SplitStage
    ms: tuple[float, ...]
    joules: float | None = None

    def __post_init__(self) -> None:
        if not self.ms or min(self.ms) < 0:
            raise ValueError(f"stage {self.stage} needs times, none of them below 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What is sent for each picture: size of the request's body, and exactness of the codec.

    `cosines` compare the resulting embedding with that of the uncompressed picture.
    """

    cut: int | None  # None for the picture itself
    codec: str
    bytes: tuple[int, ...]
    cosines: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.bytes or len(self.bytes) != len(self.cosines) or min(self.bytes) < 0:
            raise ValueError(f"payload {self.codec} needs as many sizes as cosines, at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """How exact stage times are that were predicted and not measured.

    Attributes:
        within: share by which a tower differs from what was predicted at most; None for no bound.
        level: probability that this holds of a tower like those measured; None where it is no
            more than a rule of thumb, or there is no bound.
        method: how heads and tails were predicted, for people.
        others: device whose times of pictures and codecs were used.
        others_factor: factor by which they were multiplied.
    """

    within: float | None
    level: float | None
    method: str
    others: str
    others_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes(JsonRecord):
    """Stage times of a cut set on one machine, measured or predicted.

    Attributes:
        created: ISO 8601 in UTC.
        command: the command line.
        machine: where they were measured.
        device: name of the device profile.
        bundle, space, precision: identify the tower.
        rounds: number of rounds; sample i of every stage is of round i and the same picture.
        pictures: number of different pictures; round i uses picture i modulo that.
        stages: stages of both sides; the planner uses those that the machine would run.
        payloads: what is sent.
        waiting_share, steal_share: lost shares of CPU time, as in `CpuTime`.
        contended: whether more than a tenth was lost; None if unknown.
        energy_sensor: what measured `joules`; None if nothing did.
        on_cpu: whether heads and tails ran on the CPU; None if unknown.
        predicted: None for measured times.
    """

    SCHEMA_VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "stage times"
    HINT: ClassVar[str] = "measure again with `edgeclip measure-cuts`"

    created: str
    command: str
    machine: Machine
    device: str
    bundle: str
    space: str
    precision: Precision
    rounds: int
    pictures: int
    stages: tuple[StageSamples, ...]
    payloads: tuple[Payload, ...]
    waiting_share: float | None
    steal_share: float | None
    contended: bool | None
    energy_sensor: str | None = None
    on_cpu: bool | None = None
    predicted: Predicted | None = None

    def __post_init__(self) -> None:
        if not 0 < self.pictures <= self.rounds:
            raise ValueError("there must be pictures, and at least as many rounds")
        if any(len(item.ms) != self.rounds for item in self.stages):
            raise ValueError(f"every stage must have {self.rounds} times, one a round")
        if any(len(item.bytes) != self.pictures for item in self.payloads):
            raise ValueError(f"every payload must have {self.pictures} sizes, one a picture")

    def find(self, stage: SplitStage) -> StageSamples | None:
        """Return the samples of a stage; None if it was not measured."""
        return next((item for item in self.stages if item.stage == stage), None)

    def ms(self, stage: SplitStage) -> NDArray[np.float64]:
        """Return the times of a stage in milliseconds [rounds].

        Raises:
            InputError: it was not measured.
        """
        found = self.find(stage)
        if found is None:
            raise InputError(
                f"stage {stage} was not measured on {self.device}: run `edgeclip measure-cuts` on "
                "the whole cut set there"
            )
        return np.array(found.ms)

    def check_same_tower(self, other: "StageTimes | CutManifest", what: str) -> None:
        """Raise if these times are of another tower.

        Raises:
            InputError: `other` is of another bundle, embedding space or precision.
        """
        mine = (self.bundle, self.space, self.precision)
        if mine != (other.bundle, other.space, other.precision):
            raise InputError(
                f"{what} is of {other.bundle} in {other.precision}, but these times are of "
                f"{self.bundle} in {self.precision}: measure the same cut set on both sides"
            )
