"""The measuring process, run inside this one, and what its starter makes of its end."""

import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgeclip.profiles.measure import worker_client
from edgeclip.profiles.measure.benchmark_worker import (
    TOKENS,
    WIDTH,
    YARDSTICK_GRAPH,
    YARDSTICK_NAME,
    main,
    run_request,
    yardstick_target,
)
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import WorkerRequest, WorkerResult, run_worker
from edgeclip.profiles.sensors.machine_state import peak_memory_mb
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import ConfigError, EngineError, InputError
from tests.profiles.measure.test_interleaved_benchmark import WORKLOAD, spec_of


@pytest.fixture(scope="module")
def specs(tiny_bundle: Path, cpu_device: DeviceProfile) -> tuple[SubjectSpec, ...]:
    peer = SubjectSpec(
        name="peer",
        part="image",
        device=cpu_device,
        model=str(tiny_bundle / "onnx" / "vision_model.onnx"),
    )
    return (spec_of(tiny_bundle, cpu_device, "text", "int8"), peer)


def test_turns(
    specs: tuple[SubjectSpec, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = WorkerRequest(task="interleaved", subjects=specs, workload=WORKLOAD)
    asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
    request.save(asked)
    assert WorkerRequest.load(asked) == request
    assert main([str(asked), str(answered)]) == 0
    answer = WorkerResult.load(answered)
    assert [each.identity.bundle for each in answer.runs] == ["tiny", "vision_model.onnx"]
    assert [len(each.samples_ms) for each in answer.runs] == [12, 12]
    assert answer.yardstick is not None
    assert answer.yardstick.name == YARDSTICK_NAME
    assert [len(samples) for samples in answer.yardstick.samples_ms] == [12]
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "step 1 15"


def test_memory(specs: tuple[SubjectSpec, ...]) -> None:
    answer = run_request(WorkerRequest(task="memory", subjects=specs[:1]))
    here = peak_memory_mb()
    assert answer.peak_memory_mb is None or here is None or answer.peak_memory_mb <= here
    assert (answer.peak_memory_mb is None) is (here is None)


def test_sweep_leaves_out_what_a_graph_does_not_take(
    specs: tuple[SubjectSpec, ...], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(str(specs[1].model))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    one = dataclasses.replace(specs[1], model=str(tmp_path / "one.onnx"))
    for spec, batches in ((specs[1], [1, 2]), (one, [1])):
        request = WorkerRequest(task="sweep", subjects=(spec,), batch_sizes=(1, 2), seconds=0.001)
        assert [point.batch for point in run_request(request).sweep] == batches


def test_mistakes_are_one_line(
    specs: tuple[SubjectSpec, ...],
    tiny_bundle: Path,
    cpu_device: DeviceProfile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for request, message in (
        (WorkerRequest(task="interleaved", subjects=specs), "need a workload"),
        (WorkerRequest(task="interleaved", subjects=(), workload=WORKLOAD), "at least one subject"),
        (WorkerRequest(task="sweep", subjects=specs), "one subject at a time"),
    ):
        with pytest.raises(InputError, match=message):
            run_request(request)
    wrong = dataclasses.replace(specs[1], model=str(tmp_path / "none.onnx"))
    asked = tmp_path / "request.json"
    WorkerRequest(task="memory", subjects=(wrong,)).save(asked)
    assert main([str(asked), str(tmp_path / "answer.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("edgeclip: error: image peer: model ")
    assert said.count("\n") == 1
    asked.write_text('{"schema_version": 1, "task": "dance", "extra": 1}', encoding="utf-8")
    assert main([str(asked), str(tmp_path / "answer.json")]) == 2
    said = capsys.readouterr().err
    assert "extra: unknown key" in said
    assert said.count("\n") == 1
    with pytest.raises(ConfigError):
        WorkerRequest.load(asked)


def test_it_starts_light() -> None:
    code = "import sys, edgeclip.profiles.measure.benchmark_worker\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "edgeclip" in loaded
    assert loaded.isdisjoint({"onnxruntime", "urllib3", "tokenizers", "tqdm", "pydantic", "jinja2"})


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; print('edgeclip: error: it is away', file=sys.stderr); sys.exit(2)", "it is"),
        ("raise ValueError('odd')", "the benchmark process failed: ValueError: odd"),
        ("import sys; sys.exit(3)", "the benchmark process failed: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL: it may have run out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("print('step 1 2')", "left no result"),
    ],
)
def test_a_process_that_fails(
    specs: tuple[SubjectSpec, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    message: str,
) -> None:
    module = tmp_path / "failing_process.py"
    module.write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # where `python -m` looks first
    monkeypatch.setattr(worker_client, "_MODULE", "failing_process")
    with pytest.raises(EngineError, match=message):
        run_worker(WorkerRequest(task="memory", subjects=specs[:1]))


def test_what_a_process_tells_is_passed_on(
    specs: tuple[SubjectSpec, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = """
import logging, pathlib, sys
from edgeclip.profiles.measure.worker_client import WorkerResult
from edgeclip.runtime.logs import log_to_stderr
with log_to_stderr(as_json=True):
    logging.getLogger("edgeclip.engines").info("building an engine")
    logging.getLogger("library").warning("chatter")
print("a library chatters", file=sys.stderr)
print("step 3 7\\nstep by step")
WorkerResult(peak_memory_mb=5.0).save(pathlib.Path(sys.argv[2]))
"""
    (tmp_path / "telling_process.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker_client, "_MODULE", "telling_process")
    seen: list[tuple[int, int]] = []
    request = WorkerRequest(task="memory", subjects=specs[:1])
    with caplog.at_level(logging.INFO, logger="edgeclip"):
        answer = run_worker(request, progress=lambda *at: seen.append(at))
    assert answer.peak_memory_mb == 5.0
    assert seen == [(3, 7)]
    assert caplog.record_tuples == [("edgeclip.engines", logging.INFO, "building an engine")]


def test_another_graph_would_need_another_name() -> None:
    digest = hashlib.sha256(YARDSTICK_GRAPH.read_bytes()).hexdigest()
    assert {YARDSTICK_NAME: digest[:16]} == {"transformer-layer-1": "cdbd997c8c993e75"}


@pytest.mark.parametrize("threads", [1, 2])
def test_it_runs_in_any_batch_and_always_gives_the_same(threads: int) -> None:
    target = yardstick_target(threads)
    assert (target.name, target.threads) == (YARDSTICK_NAME, threads)
    first, again, three = (np.asarray(target.run(target.make_batch(size))) for size in (1, 1, 3))
    assert first.shape == (1, TOKENS, WIDTH)
    assert three.shape == (3, TOKENS, WIDTH)
    assert np.isfinite(three).all()
    assert np.array_equal(first, again)
    assert np.abs(three[:1] - first).max() < 1e-5


def test_every_product_is_computed_in_every_run_and_no_weight_is(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "trace")
    session = onnxruntime.InferenceSession(
        str(YARDSTICK_GRAPH), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {"values": yardstick_target(1).make_batch(1)})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    # Query, key, content, projection and the two of the perceptron, and the two of attention.
    assert sum("MatMul" in op for op in ran) == 8
    assert {"LayerNormalization", "Softmax"} <= set(ran)
    assert "Erf" in ran or "Gelu" in ran
    assert not {"Range", "Sin"} & set(ran)
