"""Two processes of one run, over gloo: the losses of one process, and a resume after a kill."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgeclip.compress.train.train_loop import read_log
from edgeclip.runtime.cli.main import main
from tests.compress.train import launched_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


LOOP = "tests.compress.train.launched_run"


def run(module: str, *words: object, kill_at: int = -1) -> list[int]:
    """Run a module in two processes, as `torchrun` does; return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", module, *map(str, words)]
    started = []
    for number in range(2):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "KILL_AT": str(kill_at),
            "OMP_NUM_THREADS": "1",
        }
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL))
    try:
        return [process.wait(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()


def losses(out: Path) -> list[float]:
    return [line["total"] for line in read_log(out / "log.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / "result.pt", weights_only=True)
    return found


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    launched_run.main(str(tmp_path / "one"), "10")
    assert run(LOOP, tmp_path / "two", 10) == [0, 0]
    assert len(losses(tmp_path / "two")) == 10
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[name], atol=1e-5, rtol=0)
    # Killed in the middle and started again, they end with the very same weights.
    killed = run(LOOP, tmp_path / "killed", 10, kill_at=6)
    assert killed[0] == -signal.SIGKILL
    assert killed[1] != 0
    assert run(LOOP, tmp_path / "killed", 10) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    for name, value in weights(tmp_path / "killed").items():
        assert torch.equal(value, weights(tmp_path / "two")[name])


def test_processes_without_a_shared_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(LOOP, tmp_path / "two", 4) == [0, 0]
    # They would train on other steps, each with its own weights.
    monkeypatch.setenv("OTHER_OUT", str(tmp_path / "other"))
    assert 0 not in run(LOOP, tmp_path / "two", 6)
    assert len(losses(tmp_path / "two")) == 4


def test_two_processes_cache_and_distil_like_one(
    teacher_folder: Path, few_pictures: Path, tmp_path: Path
) -> None:
    words = ["distill", "--teacher", teacher_folder, "--data", few_pictures, "--compute", "fp32"]
    words += ["--steps", 6, "--batch-size", 4, "--image-heads", 1, "--image-layers", 1]
    assert main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    assert run("edgeclip.runtime.cli.main", *words, "--out", tmp_path / "two") == [0, 0]
    runs = [tmp_path / "one-run", tmp_path / "two-run"]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)
    sizes = [(own / "cache" / "image.rows").stat().st_size for own in runs]
    assert sizes[0] == sizes[1]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=0)
