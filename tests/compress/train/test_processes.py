"""Two processes of one run, over gloo: the losses of one process, and a resume after a kill."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgeclip.compress.train.train_loop import read_log

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def run(out: Path, count: int, *, steps: int = 10, kill_at: int = -1) -> list[int]:
    """Run `launched_run.py` in `count` processes; return their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.compress.train.launched_run", str(out), str(steps)]
    started = []
    for number in range(count):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        told = {name: str(value) for name, value in place.items()} if count > 1 else {}
        env = {
            **os.environ,
            **told,
            "MASTER_ADDR": "127.0.0.1",
            "KILL_AT": str(kill_at),
            "OMP_NUM_THREADS": "1",
        }
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL))
    try:
        return [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()


def losses(out: Path) -> list[float]:
    return [line["total"] for line in read_log(out / "log.jsonl")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / "result.pt", weights_only=True)
    return found


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    assert run(tmp_path / "one", 1) == [0]
    assert run(tmp_path / "two", 2) == [0, 0]
    assert len(losses(tmp_path / "two")) == 10
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[name], atol=1e-5, rtol=0)
    # Killed in the middle and started again, they end with the very same weights.
    killed = run(tmp_path / "killed", 2, kill_at=6)
    assert killed[0] == -signal.SIGKILL
    assert killed[1] != 0
    assert run(tmp_path / "killed", 2) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "two")
    for name, value in weights(tmp_path / "killed").items():
        assert torch.equal(value, weights(tmp_path / "two")[name])
