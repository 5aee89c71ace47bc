"""Workload: batch sizes, repeats, processes and scenarios of a profile, read from YAML."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from edgeclip.runtime.device.schema import builtin_names, check_bounds, load_profile

# Scenarios of MLPerf Inference (Reddi et al., "MLPerf Inference Benchmark", ISCA 2020).
Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much to measure. More processes give narrower intervals.

    Attributes:
        name: a short name.
        description: one line of text.
        batch_sizes: batch sizes of the throughput sweep, strictly ascending; batch 1 comes first,
            since latency is measured there.
        threads: thread counts of the throughput sweep, strictly ascending; if empty, those of the
            device.
        min_warmup_runs: least number of runs before timing starts.
        max_warmup_seconds: warm-up of one target ends after this time even if its median is
            still changing; the measurement says so.
        repeats: least number of timed runs at batch 1, per target and process; the targets' runs
            are interleaved.
        turn_seconds: least duration of the timed runs of each process. A disturbance of a shared
            machine lasts some tenths of a second; a shorter process may be disturbed as a whole.
        processes: number of fresh processes, one after the other. Two processes differ more than
            two runs of one process, so that a single process proves nothing of others.
        seconds_per_batch: time for each point of the throughput sweep.
        cold_starts: number of fresh processes whose start is timed, per target; 0 for none.
        scenarios: MLPerf LoadGen scenarios to run.
        scenario_seconds: least duration of a scenario.
        scenario_queries: least number of queries of a scenario (Offline: of samples).
        multi_stream: samples in a query of MultiStream; MLPerf has 8.
        server_load: query rate of Server as a share of the rate of one stream.
        server_bound_ms: latency bound of 99% of Server's queries; None for none.
        roofline_seconds: time to measure the machine's peak speed.

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
    def timed_runs(self) -> str:
        """Number of processes and of timed runs at batch 1, in words."""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        if not self.turn_seconds:
            return f"{processes} of {self.repeats} runs"
        return f"{processes} of at least {self.repeats} runs and {self.turn_seconds:g} s"


def load_workload(name_or_path: str | Path) -> Workload:
    """Load a built-in workload by name, or a YAML file by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or an invalid file.
    """
    return load_profile(Workload, "workloads", name_or_path)


def workload_names() -> tuple[str, ...]:
    """List the names of the built-in workloads."""
    return builtin_names("workloads")
