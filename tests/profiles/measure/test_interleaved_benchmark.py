import dataclasses
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.profiles.measure import interleaved_benchmark as module
from edgeclip.profiles.measure.interleaved_benchmark import (
    InterleavedResult,
    run_interleaved_benchmark,
    sweep_subject,
    to_measurements,
)
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import SubjectRuns, WorkerResult
from edgeclip.profiles.record.conditions import CpuTime
from edgeclip.profiles.record.measurement import Identity, PairedRatio, WarmUp, Yardstick
from edgeclip.profiles.record.timing_statistics import latency_of, paired_ratio
from edgeclip.profiles.sensors.machine_state import peak_memory_mb
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import EngineError, InputError
from tests.conftest import QUICK

pytestmark = pytest.mark.slow

WORKLOAD = dataclasses.replace(QUICK, processes=2)
IDENTITY = Identity(
    bundle="b",
    sha256="0" * 64,
    precision="fp32",
    engine="onnxruntime-cpu",
    provider="CPUExecutionProvider",
    threads=1,
    bytes_on_disk=1,
    input_shape=(1, 8, 8, 3),
)


def spec_of(bundle: Path, device: DeviceProfile, part: Any, name: Any, **more: Any) -> SubjectSpec:
    return SubjectSpec(
        name=name, part=part, device=device, bundle=str(bundle), precision=name, **more
    )


@pytest.fixture(scope="module")
def specs(tiny_bundle: Path, cpu_device: DeviceProfile) -> list[SubjectSpec]:
    return [
        spec_of(tiny_bundle, cpu_device, "image", "fp32"),
        spec_of(tiny_bundle, cpu_device, "image", "int8"),
        spec_of(tiny_bundle, cpu_device, "file", "int8"),
    ]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_fresh_processes_run_all_subjects_interleaved(
    specs: list[SubjectSpec], temporary: Path
) -> None:
    seen: list[tuple[int, int]] = []
    result = run_interleaved_benchmark(specs, WORKLOAD, lambda *at: seen.append(at), memory=False)
    assert result.specs == tuple(specs)
    assert [len(samples) for samples in result.yardstick.samples_ms] == [12, 12]
    measured = to_measurements(result, "fp32")
    assert [(item.part, item.name) for item in measured] == [
        ("image", "fp32"),
        ("image", "int8"),
        ("file", "int8"),
    ]
    assert [item.ratio is None for item in measured] == [True, False, True]
    for item, spec in zip(measured, specs, strict=True):
        assert item.identity is not None
        assert item.identity.precision == spec.precision  # whatever the order of opening was
        assert item.input_shape == item.identity.input_shape
        assert [len(samples) for samples in item.samples_ms] == [12, 12]
        assert min(map(min, item.samples_ms)) > 0
        assert item.latency.runs == 24
        assert item.warm_up.runs >= 4
        assert item.cpu.wall_s == pytest.approx(sum(map(sum, item.samples_ms)) / 1e3, rel=1e-2)
        assert item.peak_memory_mb is None
        assert {key for key, _ in item.missing} <= {"processes"}  # of a busy machine
    assert measured[2].input_shape == (1, 480, 640, 3)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][1] == 2 * (3 + 1 + 12)
    assert seen[-1][0] == seen[-1][1]
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(peak_memory_mb() is None, reason="peak memory is not reported here")
def test_memory_is_that_of_a_process_of_its_own(specs: list[SubjectSpec], temporary: Path) -> None:
    once = dataclasses.replace(WORKLOAD, processes=1, repeats=3)
    seen: list[tuple[int, int]] = []
    result = run_interleaved_benchmark(specs[:1], once, lambda *at: seen.append(at))
    (item,) = to_measurements(result)
    assert item.peak_memory_mb is not None
    assert 20 < item.peak_memory_mb < 400
    assert seen[-1][0] == seen[-1][1]


def test_sweep_has_a_process_for_each_number_of_threads(
    specs: list[SubjectSpec], temporary: Path
) -> None:
    points = sweep_subject(specs[1], (1, 3), (1, 2), 0.001)
    assert [(point.threads, point.batch) for point in points] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for point in points:
        assert 0 <= point.items_per_s.low <= point.items_per_s.value <= point.items_per_s.high
        assert point.items_per_s.value == pytest.approx(1e3 * point.batch / point.p50_ms.value)
    assert list(temporary.iterdir()) == []


def test_the_message_says_which_subject_and_why(
    specs: list[SubjectSpec], tiny_bundle: Path, cpu_device: DeviceProfile, temporary: Path
) -> None:
    lacking = spec_of(tiny_bundle, cpu_device, "text", "fp16")
    with pytest.raises(EngineError) as found:
        run_interleaved_benchmark([specs[0], lacking], WORKLOAD)
    message = "text fp16: the bundle has no fp16 text tower; it has fp32, int8"
    assert str(found.value) == message
    gone = spec_of(tiny_bundle, cpu_device, "file", "int8", pictures=("no/such.jpg",))
    with pytest.raises(EngineError) as found:
        run_interleaved_benchmark([gone], WORKLOAD)
    assert str(found.value).startswith("file int8: image no/such.jpg does not exist")
    assert "\n" not in str(found.value)
    assert list(temporary.iterdir()) == []


def test_ctrl_c_ends_the_process_and_leaves_nothing(
    specs: list[SubjectSpec], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Kept(subprocess.Popen[str]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    def press(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Kept)
    endless = dataclasses.replace(WORKLOAD, repeats=10**9)
    with pytest.raises(KeyboardInterrupt):
        run_interleaved_benchmark(specs[:1], endless, press)
    assert [process.returncode for process in started] == [-9]
    assert list(temporary.iterdir()) == []


def test_refuses_what_cannot_be_told_apart(specs: list[SubjectSpec]) -> None:
    with pytest.raises(InputError, match="at least one subject"):
        run_interleaved_benchmark([], WORKLOAD)
    with pytest.raises(InputError, match="different names, got image fp32, image fp32"):
        run_interleaved_benchmark([specs[0], specs[0]], WORKLOAD)


def subject_runs(samples: tuple[float, ...], **changes: Any) -> SubjectRuns:
    cpu = CpuTime(
        wall_s=1.0,
        thread_s=0.9,
        process_s=1.5,
        waiting_share=changes.pop("waiting", None),
        steal_share=changes.pop("steal", None),
    )
    warm = WarmUp(runs=5, settled=changes.pop("settled", True))
    whole: dict[str, Any] = {"identity": IDENTITY, "remarks": (), **changes}
    return SubjectRuns(samples_ms=samples, warm_up=warm, cpu=cpu, input_shape=(1, 2), **whole)


def result_of(specs: list[SubjectSpec], *processes: tuple[SubjectRuns, ...]) -> InterleavedResult:
    return InterleavedResult(
        specs=tuple(specs),
        runs=processes,
        yardstick=Yardstick(name="y", samples_ms=tuple((1.0,) for _ in processes)),
        peak_memory_mb=(50.0,) * (len(specs) - 1) + (None,),
    )


def test_several_processes_are_summed_up(specs: list[SubjectSpec]) -> None:
    result = result_of(
        specs[:2],
        (subject_runs((4.0, 8.0, 4.0), waiting=0.02), subject_runs((1.0, 2.0, 1.0))),
        (subject_runs((6.0, 6.0, 6.0), waiting=0.3), subject_runs((3.0, 3.0, 3.0), settled=False)),
        (subject_runs((2.0, 2.0, 2.0), steal=0.0), subject_runs((0.5, 0.5, 0.5))),
    )
    fp32, int8 = to_measurements(result, "fp32")
    assert fp32.samples_ms == ((4.0, 8.0, 4.0), (6.0, 6.0, 6.0), (2.0, 2.0, 2.0))
    ours, theirs = (list(map(np.array, item.samples_ms)) for item in (int8, fp32))
    assert fp32.latency == latency_of(theirs)
    assert int8.ratio == PairedRatio(reference="fp32", ratio=paired_ratio(ours, theirs))
    assert fp32.warm_up == WarmUp(runs=15, settled=True)
    assert int8.warm_up == WarmUp(runs=15, settled=False)
    assert (fp32.cpu.wall_s, fp32.cpu.process_s) == (3.0, 4.5)
    assert (fp32.cpu.waiting_share, fp32.cpu.steal_share) == (0.3, 0.0)
    assert fp32.contended is True
    assert int8.cpu.waiting_share is None
    assert (fp32.peak_memory_mb, int8.peak_memory_mb) == (50.0, None)
    assert (fp32.missing, [key for key, _ in int8.missing]) == ((), ["memory"])


@pytest.mark.parametrize(
    ("waiting", "asked", "kept"),
    [
        ([0.0, 0.01], 2, [0, 1]),
        ([0.4, 0.0, 0.01], 3, [1, 2]),
        ([0.4, 0.3, 0.2, 0.1], 4, [2, 3]),  # no more than twice as many
        ([None, None], 2, [0, 1]),  # what cannot be told replaces nothing
    ],
)
def test_disturbed_processes_are_replaced(
    waiting: list[float | None],
    asked: int,
    kept: list[int],
    specs: list[SubjectSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = iter(
        WorkerResult(
            runs=(subject_runs((float(number + 1),) * 3, waiting=share),),
            yardstick=Yardstick(name="y", samples_ms=((float(number + 1),) * 3,)),
        )
        for number, share in enumerate(waiting)
    )
    monkeypatch.setattr(module, "run_worker", lambda request, progress=None: next(results))
    result = run_interleaved_benchmark(specs[:1], WORKLOAD, memory=False)
    assert next(results, None) is None
    assert len(waiting) == asked
    expected = [float(number + 1) for number in kept]
    assert [process[0].samples_ms[0] for process in result.runs] == expected
    assert [samples[0] for samples in result.yardstick.samples_ms] == expected
    assert result.left_out == asked - 2
    (item,) = to_measurements(result)
    assert [key for key, _ in item.missing] == (["processes"] if result.left_out else [])


def test_ratios_are_within_a_part_only(specs: list[SubjectSpec]) -> None:
    result = result_of(specs, tuple(subject_runs((value,) * 3) for value in (8.0, 2.0, 16.0)))
    assert [item.ratio is None for item in to_measurements(result)] == [True] * 3
    assert [item.ratio is None for item in to_measurements(result, "fp32")] == [True, False, True]
    assert [item.ratio is None for item in to_measurements(result, "int8")] == [False, True, True]
    assert [item.ratio is None for item in to_measurements(result, "other")] == [True] * 3


def test_remarks_say_of_which_process_they_are(specs: list[SubjectSpec]) -> None:
    late = subject_runs((1.0,) * 3, remarks=(("server", "2 of 9 answers are the device's own"),))
    good = subject_runs((1.0,) * 3)
    (one,) = to_measurements(dataclasses.replace(result_of(specs[:1], (late,)), peak_memory_mb=()))
    assert one.missing == late.remarks
    two = dataclasses.replace(result_of(specs[:1], (good,), (late,)), peak_memory_mb=())
    ((_, text),) = to_measurements(two)[0].missing
    assert text == "process 2 of 2: 2 of 9 answers are the device's own"


def test_what_changed_meanwhile_is_not_summed_up(specs: list[SubjectSpec]) -> None:
    other = dataclasses.replace(IDENTITY, sha256="1" * 64)
    result = result_of(
        specs[:1], (subject_runs((1.0,) * 3),), (subject_runs((1.0,) * 3, identity=other),)
    )
    with pytest.raises(EngineError, match="image fp32 was altered while it was measured"):
        to_measurements(result)
