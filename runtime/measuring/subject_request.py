"""What a fresh process is asked to measure, and what it answers: files of JSON."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeclip.profiles.workload import Workload
from edgeclip.runtime.json_record import JsonRecord
from edgeclip.runtime.measuring.measurement import Identity, SweepPoint, WarmUp, Yardstick
from edgeclip.runtime.measuring.subject import SubjectSpec
from edgeclip.runtime.sensing.cpu_time import CpuTime

Errand = Literal["turns", "memory", "sweep"]

# What the process prints: how far it is, on stdout, and why it failed, on stderr.
STEP = "step"
TOLD = "edgeclip: "
ERROR = f"{TOLD}error: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(JsonRecord):
    """What to do.

    Attributes:
        errand: "turns" lets all subjects and the yardstick take turns; "memory" opens the one
            subject and runs it a few times; "sweep" runs the one subject in larger batches.
        subjects: which ones.
        workload: of "turns".
        batch_sizes: of "sweep".
        seconds: for each batch size of "sweep".
    """

    WHAT: ClassVar[str] = "a request"
    MEND: ClassVar[str] = "write it with this version"

    errand: Errand
    subjects: tuple[SubjectSpec, ...]
    workload: Workload | None = None
    batch_sizes: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectTurns:
    """What one subject did in one process.

    Attributes:
        samples_ms: wall time of each timed run at batch 1, in round order.
        warm_up, cpu, input_shape, identity: see `Measurement`.
        remarks: see `Measurement.missing`.
    """

    samples_ms: tuple[float, ...]
    warm_up: WarmUp
    cpu: CpuTime
    input_shape: tuple[int, ...]
    identity: Identity
    remarks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(JsonRecord):
    """What was measured.

    Attributes:
        turns: one for each subject, in the request's order.
        yardstick: of "turns".
        peak_memory_mb: of "memory", see `Measurement`; None where nothing reports it.
        sweep: of "sweep"; a batch that the graph does not take is left out.
    """

    WHAT: ClassVar[str] = "an answer"
    MEND: ClassVar[str] = "measure again"

    turns: tuple[SubjectTurns, ...] = ()
    yardstick: Yardstick | None = None
    peak_memory_mb: float | None = None
    sweep: tuple[SweepPoint, ...] = ()
