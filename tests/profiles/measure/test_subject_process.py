"""The measuring process, run inside this one, and what its starter makes of its end."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from edgeclip.profiles.measure import benchmark_worker
from edgeclip.profiles.measure import worker_client as ask_module
from edgeclip.profiles.measure.benchmark_worker import answer_to, main
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.profiles.measure.worker_client import Answer, Request, ask_process
from edgeclip.profiles.sensors.clocks import peak_memory_mb
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import ConfigError, EngineError, InputError
from tests.profiles.measure.test_take_turns import WORKLOAD, spec_of


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
    request = Request(errand="turns", subjects=specs, workload=WORKLOAD)
    asked, answered = tmp_path / "request.json", tmp_path / "answer.json"
    request.save(asked)
    assert Request.load(asked) == request
    assert main([str(asked), str(answered)]) == 0
    answer = Answer.load(answered)
    assert [each.identity.bundle for each in answer.turns] == ["tiny", "vision_model.onnx"]
    assert [len(each.samples_ms) for each in answer.turns] == [12, 12]
    assert answer.yardstick is not None
    assert answer.yardstick.name == benchmark_worker.NAME
    assert [len(samples) for samples in answer.yardstick.samples_ms] == [12]
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "step 1 15"


def test_memory(specs: tuple[SubjectSpec, ...]) -> None:
    answer = answer_to(Request(errand="memory", subjects=specs[:1]))
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
        request = Request(errand="sweep", subjects=(spec,), batch_sizes=(1, 2), seconds=0.001)
        assert [point.batch for point in answer_to(request).sweep] == batches


def test_mistakes_are_one_line(
    specs: tuple[SubjectSpec, ...],
    tiny_bundle: Path,
    cpu_device: DeviceProfile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for request, message in (
        (Request(errand="turns", subjects=specs), "turns need a workload"),
        (Request(errand="turns", subjects=(), workload=WORKLOAD), "at least one subject"),
        (Request(errand="sweep", subjects=specs), "one subject at a time"),
    ):
        with pytest.raises(InputError, match=message):
            answer_to(request)
    wrong = dataclasses.replace(specs[1], model=str(tmp_path / "none.onnx"))
    asked = tmp_path / "request.json"
    Request(errand="memory", subjects=(wrong,)).save(asked)
    assert main([str(asked), str(tmp_path / "answer.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("edgeclip: error: image peer: model ")
    assert said.count("\n") == 1
    asked.write_text('{"schema_version": 1, "errand": "dance", "extra": 1}', encoding="utf-8")
    assert main([str(asked), str(tmp_path / "answer.json")]) == 2
    said = capsys.readouterr().err
    assert "extra: unknown key" in said
    assert said.count("\n") == 1
    with pytest.raises(ConfigError):
        Request.load(asked)


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
        ("raise ValueError('odd')", "a process that measured failed: ValueError: odd"),
        ("import sys; sys.exit(3)", "a process that measured failed: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL: it may have run out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("print('step 1 2')", "left no answer"),
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
    monkeypatch.setattr(ask_module, "_MODULE", "failing_process")
    with pytest.raises(EngineError, match=message):
        ask_process(Request(errand="memory", subjects=specs[:1]))


def test_what_a_process_tells_is_passed_on(
    specs: tuple[SubjectSpec, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = """
import pathlib, sys
from edgeclip.profiles.measure.worker_client import Answer
print("edgeclip: building an engine", file=sys.stderr, flush=True)
print("a library chatters", file=sys.stderr)
print("step 3 7\\nstep by step")
Answer(peak_memory_mb=5.0).save(pathlib.Path(sys.argv[2]))
"""
    (tmp_path / "telling_process.py").write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ask_module, "_MODULE", "telling_process")
    seen: list[tuple[int, int]] = []
    request = Request(errand="memory", subjects=specs[:1])
    answer = ask_process(request, progress=lambda *at: seen.append(at))
    assert answer.peak_memory_mb == 5.0
    assert seen == [(3, 7)]
    assert capsys.readouterr().err == "edgeclip: building an engine\n"
