"""Workload: what `edgeclip profile` runs, and how often."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from edgeclip.runtime.device.schema import builtin_names, check_bounds, load_profile

# Those of MLPerf Inference (Reddi et al., "MLPerf Inference Benchmark", ISCA 2020).
Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much to measure. More runs give narrower intervals.

    Attributes:
        name: a short name.
        description: one line for a person.
        batch_sizes: the throughput sweep, strictly ascending; batch 1 comes first, since
            latency is measured there.
        threads: of the sweep, strictly ascending; empty for those of the device alone.
        min_warmup_runs: runs before timing starts, at least.
        max_warmup_seconds: warm-up of one candidate ends here even if its median still
            moves; the measurement says so.
        repeats: timed runs at batch 1, per candidate and process, at least; they take turns.
        turn_seconds: each process goes on with the turns for at least so long. What disturbs a
            shared machine lasts some tenths of a second; a median over less may be all disturbed.
        processes: fresh processes that do these runs, one after the other. Two processes differ
            more than two runs of one do, so that intervals from a single one are too narrow.
        seconds_per_batch: time given to each size of the sweep, per candidate.
        cold_starts: fresh processes whose start is timed, per candidate; 0 for none.
        scenarios: those of LoadGen to run.
        scenario_seconds: each lasts at least this long.
        scenario_queries: and has at least so many queries (Offline: samples).
        multi_stream: samples in a query of MultiStream; MLPerf has 8.
        server_load: queries a second of Server, as a share of what one stream manages.
        server_bound_ms: the latency that 99% of Server's queries must keep; None for none.
        roofline_seconds: time given to the machine's own peaks.

    Raises:
        ValueError: a value out of bounds; all of them in one message.
    """

    name: str
    description: str
    batch_sizes: tuple[int, ...]
    min_warmup_runs: Annotated[int, Ge(1)]
    max_warmup_seconds: Annotated[float, Gt(0)]
    repeats: Annotated[int, Ge(3)]
    seconds_per_batch: Annotated[float, Gt(0)]
    cold_starts: Annotated[int, Ge(0)]
    threads: tuple[int, ...] = ()
    turn_seconds: Annotated[float, Ge(0)] = 0.0
    processes: Annotated[int, Ge(1)] = 1
    scenarios: tuple[Scenario, ...] = ()
    scenario_seconds: Annotated[float, Gt(0)] = 10.0
    scenario_queries: Annotated[int, Ge(1)] = 100
    multi_stream: Annotated[int, Ge(1)] = 8
    server_load: Annotated[float, Gt(0)] = 0.5
    server_bound_ms: Annotated[float | None, Gt(0)] = None
    roofline_seconds: Annotated[float, Gt(0)] = 10.0

    def __post_init__(self) -> None:
        check_bounds(self)
        mistakes = []
        if not self.name.strip():
            mistakes.append("name must not be empty")
        sizes = self.batch_sizes
        if sizes[:1] != (1,) or list(sizes) != sorted(set(sizes)):
            mistakes.append("batch_sizes must be 1, then larger and larger sizes, such as [1, 8]")
        if list(self.threads) != sorted(set(self.threads)) or min(self.threads, default=1) < 1:
            mistakes.append("threads must be larger and larger numbers, such as [1, 2]")
        if len(set(self.scenarios)) != len(self.scenarios):
            mistakes.append("scenarios must not repeat one")
        if mistakes:
            raise ValueError("; ".join(mistakes))

    @property
    def turns(self) -> str:
        """How much is timed at batch 1, for a person."""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        if not self.turn_seconds:
            return f"{processes} of {self.repeats} runs"
        return f"{processes} of at least {self.repeats} runs and {self.turn_seconds:g} s"


def load_workload(name_or_path: str | Path) -> Workload:
    """A built-in workload by name, or a YAML file by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or a bad file.
    """
    return load_profile(Workload, "workloads", name_or_path)


def workload_names() -> tuple[str, ...]:
    """Names of the built-in workloads."""
    return builtin_names("workloads")
