"""What disturbed a measurement, from counters of processor time and of throttling."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeclip.profiles.record.conditions import MachineConditions
from edgeclip.profiles.sensors.interference import (
    BusyTime,
    InterferenceWatch,
    judge_interference,
    slowdowns_between,
)
from tests.profiles.sensors.kernel_trees import write_tree

LINUX = pytest.mark.skipif(BusyTime.take() is None, reason="the system does not count it")
BURN = "import time; end = time.perf_counter() + {}\nwhile time.perf_counter() < end: pass"


def process(parent: int, *ticks: int) -> str:
    """The `stat` of a process; its name is as hard to read as names may be."""
    own = " ".join(map(str, ticks))
    return f"7 (a) (b c) S {parent} 7 7 0 -1 4194304 900 12 0 0 {own} 20 0 1 0 33 1024 5"


def machine(root: Path, cpu: str, processes: dict[int, str]) -> BusyTime | None:
    write_tree(root, {f"proc/{pid}/stat": text for pid, text in processes.items()})
    write_tree(root, {"proc/stat": f"cpu  {cpu}\ncpu0 1 2 3", "proc/sys/x": "", "proc/self": ""})
    return BusyTime.take(root, pid=10)


def conditions(
    counts: tuple[tuple[str, int], ...] = (), gpu: tuple[tuple[str, str], ...] = ()
) -> MachineConditions:
    return MachineConditions(
        taken="2026-01-01T00:00:00+00:00",
        cpu_mhz=(),
        governor=None,
        load_1m=None,
        temperatures_c=(),
        throttle_counts=counts,
        gpu=gpu,
    )


def test_this_process_and_its_descendants_are_not_others(tmp_path: Path) -> None:
    before = machine(
        tmp_path / "before",
        "1000 10 100 5000 50 5 5 0 0 0",
        {10: process(1, 100, 20, 0, 0), 11: process(10, 30, 0, 0, 0), 20: process(1, 500, 0, 0, 0)},
    )
    # Child 11 ended and its time went to process 10; child 12 is new, and has a child of its own.
    after = machine(
        tmp_path / "after",
        "1150 10 120 5100 50 10 10 10 0 0",
        {
            10: process(1, 110, 25, 40, 0),
            12: process(10, 40, 5, 0, 0),
            13: process(12, 10, 0, 0, 0),
            20: process(1, 540, 0, 0, 0),
        },
    )
    assert before is not None
    assert after is not None
    assert (before.own, after.own) == (150, 230)
    assert (after.programs - before.programs, after.processors - before.processors) == (170, 290)
    assert after.others_since(before) == pytest.approx((170 - 80) / 290)
    assert before.others_since(before) is None


def test_contradictory_counters_never_give_a_negative_share() -> None:
    before = BusyTime(programs=100, processors=1000, own=50)
    after = BusyTime(programs=110, processors=1100, own=65)
    assert after.others_since(before) == 0


def test_nothing_is_reported_without_counters(tmp_path: Path) -> None:
    assert BusyTime.take(tmp_path) is None
    assert machine(tmp_path, "1 2 3", {10: process(1, 1, 0, 0, 0)}) is None  # an old kernel
    assert machine(tmp_path / "a", "1 2 3 4 5 6 7 8", {11: process(1, 1, 0, 0, 0)}) is None


@LINUX
def test_time_of_a_child_is_own_time_while_it_runs_and_after() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    before = BusyTime.take()
    script = BURN.format(0.3) + "\nprint(time.process_time(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        burnt = float(child.stdout.readline())
        alive = BusyTime.take()
        child.kill()
    ended = BusyTime.take()
    assert before is not None
    assert alive is not None
    assert ended is not None
    assert alive.own - before.own >= (burnt - 0.05) * ticks
    assert ended.own >= alive.own


@LINUX
def test_an_unrelated_process_counts_as_other(tmp_path: Path) -> None:
    """It is started by a shell that ends, so that it belongs to nobody here."""
    script = tmp_path / "burn.py"
    script.write_text(BURN.format(0.8), encoding="utf-8")
    with InterferenceWatch() as watch:
        command = f"{sys.executable} {script} >/dev/null 2>&1 &"
        subprocess.run(["sh", "-c", command], check=True)
        time.sleep(0.8)
    found = watch.found
    assert found.others_share is not None
    # A busy or stolen machine gives it less than the core that it asks for.
    stolen = found.steal_share or 0.0
    assert found.others_share + stolen > 0.2 / (os.cpu_count() or 1)
    if found.others_share > 0.1:
        assert found.disturbed
        assert "other programs used" in found.reasons[0]


def test_waiting_is_unknown_for_a_process_that_hardly_runs() -> None:
    with InterferenceWatch() as watch:
        time.sleep(0.2)
    assert watch.found.waiting_share is None
    assert watch.before.taken <= watch.after.taken


@LINUX
def test_waiting_is_known_for_a_process_that_works() -> None:
    with InterferenceWatch() as watch:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            pass
    assert watch.found.others_share is not None
    share = watch.found.waiting_share
    assert share is None or 0 <= share < 1


def test_reasons_are_words() -> None:
    found = judge_interference(
        waiting_share=0.15,
        steal_share=0.02,
        others_share=0.23,
        slowdowns=("a processor was slowed",),
    )
    assert found.disturbed
    assert found.throttled
    assert found.reasons == (
        "other programs used 23% of the processors",
        "15% of the CPU time asked for was spent waiting for a core",
        "a processor was slowed",
    )
    stolen = judge_interference(steal_share=0.5)
    assert stolen.reasons == ("the hypervisor took 50% of the processors",)
    assert stolen.throttled is None


def test_quiet_is_not_unknown() -> None:
    quiet = judge_interference(others_share=0.1)
    assert (quiet.disturbed, quiet.throttled, quiet.reasons) == (False, None, ())
    assert judge_interference(slowdowns=()).throttled is False
    assert judge_interference(slowdowns=()).disturbed is False
    unknown = judge_interference()
    assert (unknown.disturbed, unknown.throttled) == (None, None)


def test_counters_that_rose_are_slowdowns() -> None:
    before = conditions((("core_throttle_count", 10), ("oc3_event_cnt", 2)))
    after = conditions((("core_throttle_count", 10), ("oc3_event_cnt", 5), ("oc1_event_cnt", 1)))
    assert slowdowns_between(before, after, 1.0) == (
        "a processor was slowed for its heat or supply: oc3_event_cnt rose by 3",
    )
    assert slowdowns_between(before, before, 1.0) == ()
    assert slowdowns_between(conditions(), conditions(), 1.0) is None


def test_a_gpu_that_was_slowed() -> None:
    hot = "slowed by heat ms"
    before = conditions(gpu=((hot, "100.0"), ("clocks held by", "idle")))
    power = conditions(gpu=((hot, "105.0"), ("clocks held by", "power cap")))
    assert slowdowns_between(before, power, 1.0) == ()
    heat = conditions(gpu=((hot, "350.0"), ("clocks held by", "power cap, power brake")))
    assert slowdowns_between(before, heat, 1.0) == (
        "the GPU was slowed for its heat for 25% of the time",
        "the GPU's clocks were held down: power brake",
    )
