"""The loop on a line fit of two numbers: every step can be checked in no time."""

import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from edgeclip.compress.train.kept_weights import BestStep, Validation
from edgeclip.compress.train.train_loop import (
    Batch,
    BatchPart,
    Rows,
    Schedule,
    TrainSettings,
    TrainTask,
    read_log,
    train,
)
from edgeclip.runtime.errors import ConfigError, MissingExtraError

SETTINGS = TrainSettings(
    steps=10, batch_size=4, warmup_steps=2, compute="fp32", checkpoint_seconds=1e-6, workers=0
)


class InterruptedRunError(Exception):
    """Stands for whatever ends a run between two checkpoints."""


def _module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    module.register_buffer("ballast", torch.zeros(1000))  # so that weights are more than a log
    return module


def _batch(part: BatchPart) -> Batch:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(part.step))
    y = x.sum(dim=1, keepdim=True)
    step = torch.full((4, 1), part.step)
    whole = {"x": x, "y": y, "step": step}
    own = {name: rows.chunk(part.count)[part.number] for name, rows in whole.items()}
    return Batch(inputs={"x": own.pop("x")}, targets=own)


def _task(
    module: nn.Module,
    *,
    at_step: Callable[[int], None] = lambda _step: None,
    loss_factor: Callable[[int], float] = lambda _step: 1.0,
    identity: str = "line",
) -> TrainTask:
    def losses(found: Rows, targets: Rows) -> dict[str, Tensor]:
        step = int(targets["step"][0])
        at_step(step)
        square = (found["y"] - targets["y"]).square().mean()
        return {"total": square * loss_factor(step), "square": square}

    return TrainTask(
        title="test",
        module=module,
        batch=_batch,
        embed=lambda inputs: {"y": module(inputs["x"])},
        losses=losses,
        identity=identity,
    )


def _first() -> tuple[Tensor, Tensor]:
    batch = _batch(BatchPart(0, 0, 1))
    return batch.inputs["x"], batch.targets["y"]


def _checkpoint(run: Path) -> Path:
    """The last checkpoint; a kill while it was written may have left the one before it."""
    return max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def _saved(run: Path, name: str) -> dict[str, Tensor]:
    return load_file(_checkpoint(run) / f"{name}.safetensors")


def _step_saved(run: Path) -> int:
    return int(json.loads((_checkpoint(run) / "state.json").read_text())["step"])


def _stop_at(stop: int) -> Callable[[int], None]:
    def at_step(step: int) -> None:
        if step == stop:
            raise InterruptedRunError

    return at_step


def _trained(out: Path, settings: TrainSettings = SETTINGS) -> nn.Module:
    module = _module()
    train(_task(module), settings, out)
    return module


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _steps(out: Path) -> list[float]:
    return [line["step"] for line in read_log(out / "log.jsonl")]


def test_log_and_checkpoint(tmp_path: Path) -> None:
    module = _trained(tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 11))
    assert all(set(line) == {"step", "seconds", "total", "square"} for line in log)
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds)
    x, y = _first()
    assert log[0]["square"] == pytest.approx((_module()(x) - y).square().mean().item())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-10",
        "log.jsonl",
    ]
    assert not module.training


def test_learning_lowers_the_loss(tmp_path: Path) -> None:
    _trained(
        tmp_path,
        replace(
            SETTINGS, steps=300, learning_rate=0.05, weight_decay=0.0, checkpoint_seconds=1000.0
        ),
    )
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["total"] < 0.01 * log[0]["total"]


def test_first_step_by_hand(tmp_path: Path) -> None:
    # AdamW's first step moves every weight by the rate against the sign of its gradient,
    # after shrinking those that decay by rate x decay.
    module = _module()
    assert isinstance(module, nn.Linear)
    x, y = _first()
    (module(x) - y).square().mean().backward()
    assert module.weight.grad is not None
    assert module.bias.grad is not None
    settings = replace(
        SETTINGS,
        steps=1,
        warmup_steps=1,
        optimizer="adamw",
        learning_rate=0.01,
        weight_decay=0.5,
    )
    with torch.no_grad():
        weight = module.weight * (1 - 0.01 * 0.5) - 0.01 * module.weight.grad.sign()
        bias = module.bias - 0.01 * module.bias.grad.sign()
    trained = _trained(tmp_path, settings)
    assert isinstance(trained, nn.Linear)
    torch.testing.assert_close(trained.weight.detach(), weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(trained.bias.detach(), bias, atol=1e-6, rtol=0)


def test_frozen_weights_stay(tmp_path: Path) -> None:
    module = _module()
    assert isinstance(module, nn.Linear)
    module.weight.requires_grad_(False)
    before = module.weight.clone()
    train(_task(module), SETTINGS, tmp_path)
    assert torch.equal(module.weight, before)
    assert not torch.equal(module.bias, _module().get_parameter("bias"))


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_resuming_gives_the_same_weights(tmp_path: Path, stop: int) -> None:
    whole = _trained(tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        train(_task(_module(), at_step=_stop_at(stop)), SETTINGS, tmp_path / "parts")
    done: list[int] = []
    module = _module()
    train(_task(module, at_step=done.append), SETTINGS, tmp_path / "parts")
    assert done == list(range(stop, 10))
    assert _equal(module, whole)
    assert _steps(tmp_path / "parts") == list(range(1, 11))
    losses = [
        [line["total"] for line in read_log(tmp_path / name / "log.jsonl")]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_lines_after_the_checkpoint_are_not_kept_twice(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(_task(_module(), at_step=_stop_at(6)), SETTINGS, tmp_path)
    log = tmp_path / "log.jsonl"
    line = json.dumps({"step": 7, "seconds": 1.0, "total": 1.0})
    with log.open("a", encoding="utf-8") as stream:  # steps of a run that was killed
        stream.write(f"{line}\n{line[:20]}")
    _trained(tmp_path)
    assert _steps(tmp_path) == list(range(1, 11))


def test_a_log_that_was_deleted_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(_task(_module(), at_step=_stop_at(6)), SETTINGS, tmp_path)
    (tmp_path / "log.jsonl").unlink()
    _trained(tmp_path)
    assert _steps(tmp_path) == list(range(7, 11))


def test_stopped_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    rare = replace(SETTINGS, checkpoint_seconds=1000.0)
    with pytest.raises(InterruptedRunError):
        train(_task(_module(), at_step=_stop_at(4)), rare, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    done: list[int] = []
    train(_task(_module(), at_step=done.append), rare, tmp_path)
    assert done == list(range(10))
    assert _steps(tmp_path) == list(range(1, 11))


def test_a_finished_run_trains_no_more(tmp_path: Path) -> None:
    module = _trained(tmp_path)
    done: list[int] = []
    again = _module()
    train(_task(again, at_step=done.append), SETTINGS, tmp_path)
    assert done == []
    assert _equal(again, module)


def test_how_often_to_save_may_change(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(_task(_module(), at_step=_stop_at(5)), SETTINGS, tmp_path)
    module = _trained(tmp_path, replace(SETTINGS, checkpoint_seconds=60.0))
    assert _equal(module, _trained(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 9), ("batch_size", 5), ("learning_rate", 0.1), ("seed", 1), ("compute", "bf16")],
)
def test_other_settings_are_refused(tmp_path: Path, name: str, value: float | str) -> None:
    _trained(tmp_path)
    before = _saved(tmp_path, "weights")
    with pytest.raises(ConfigError, match=r"holds a run .*choose another"):
        _trained(tmp_path, replace(SETTINGS, **{name: value}))  # type: ignore[arg-type]
    assert torch.equal(_saved(tmp_path, "weights")["weight"], before["weight"])
    assert len(_steps(tmp_path)) == 10


@pytest.mark.parametrize("stop", [5, None])
def test_steps_may_be_raised(
    tmp_path: Path, stop: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    if stop is None:
        _trained(tmp_path)
    else:
        with pytest.raises(InterruptedRunError):
            train(_task(_module(), at_step=_stop_at(stop)), SETTINGS, tmp_path)
    start, more = stop or 10, replace(SETTINGS, steps=16)
    done: list[int] = []
    module = _module()
    train(_task(module, at_step=done.append), more, tmp_path)
    assert done == list(range(start, 16))
    assert _steps(tmp_path) == list(range(1, 17))
    assert f"goes on from step {start + 1} as in a run of 16" in caplog.text
    assert more.rate(10) > SETTINGS.rate(9)  # a warm restart
    again = _module()
    train(_task(again, at_step=done.append), more, tmp_path)
    assert len(done) == 16 - start
    assert _equal(again, module)
    with pytest.raises(ConfigError, match="holds a run that has done 16 steps: give at least as"):
        _trained(tmp_path)


FULL_DISK = """
import resource, sys
from pathlib import Path
from dataclasses import replace
from edgeclip.runtime.errors import InputError
from tests.compress.train.test_train_loop import SETTINGS, _module, _task
from edgeclip.compress.train.train_loop import train

def at_step(step):
    if step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

try:
    train(_task(_module(), at_step=at_step), SETTINGS, Path(sys.argv[1]))
except InputError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "parts"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint-6: its disk is full (" in done.stdout
    assert done.stdout.count("\n") == 1
    assert _step_saved(tmp_path / "parts") == 5
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["checkpoint-5", "log.jsonl"]
    assert _equal(_trained(tmp_path / "parts"), _trained(tmp_path / "whole"))
    assert _steps(tmp_path / "parts") == list(range(1, 11))


def test_another_task_is_refused(tmp_path: Path) -> None:
    _trained(tmp_path)
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        train(_task(_module(), identity="circle"), SETTINGS, tmp_path)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, loss: float) -> None:
    task = _task(_module(), loss_factor=lambda step: loss if step == 6 else 1.0)
    with pytest.raises(ConfigError, match=rf"the loss is {loss} at step 7: lower the learning"):
        train(task, SETTINGS, tmp_path)
    assert _step_saved(tmp_path) == 6
    assert all(value.isfinite().all() for value in _saved(tmp_path, "weights").values())


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        _flip_a_byte,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"{}"),
        Path.unlink,
    ],
)
def test_damaged_checkpoint(tmp_path: Path, damage: Callable[[Path], object], name: str) -> None:
    _trained(tmp_path)
    folder = _checkpoint(tmp_path)
    damage(folder / name)
    with pytest.raises(ConfigError, match="checkpoint-10 is damaged; delete it to start again"):
        _trained(tmp_path)
    shutil.rmtree(folder)
    _trained(tmp_path)


def test_interruption_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    rare = replace(SETTINGS, checkpoint_seconds=1000.0)
    before = signal.getsignal(signal.SIGINT)
    task = _task(
        _module(), at_step=lambda step: signal.raise_signal(signal.SIGINT) if step == 3 else None
    )
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4; run it again to go on"):
        train(task, rare, tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is before
    assert _steps(tmp_path / "parts") == [1, 2, 3, 4]
    assert _equal(_trained(tmp_path / "parts", rare), _trained(tmp_path / "whole"))
    assert _steps(tmp_path / "parts") == list(range(1, 11))


def test_a_second_interruption_does_not_wait(tmp_path: Path) -> None:
    def twice(step: int) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(_task(_module(), at_step=twice), SETTINGS, tmp_path)
    assert _step_saved(tmp_path) == 3


def test_interruption_in_the_last_step_is_no_loss(tmp_path: Path) -> None:
    task = _task(
        _module(), at_step=lambda step: signal.raise_signal(signal.SIGINT) if step == 9 else None
    )
    train(task, SETTINGS, tmp_path)
    assert len(_steps(tmp_path)) == 10


def test_training_in_another_thread(tmp_path: Path) -> None:
    modules: list[nn.Module] = []
    thread = threading.Thread(target=lambda: modules.append(_trained(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert _equal(modules[0], _trained(tmp_path / "main"))


def test_a_failing_batch_fails_the_run(tmp_path: Path) -> None:
    def batch(part: BatchPart) -> Batch:
        if part.step == 5:
            raise ConfigError("picture 17 is damaged")
        return _batch(part)

    for workers in (0, 2):
        settings = replace(SETTINGS, workers=workers)
        with pytest.raises(ConfigError, match=r"^picture 17 is damaged$"):
            train(replace(_task(_module()), batch=batch), settings, tmp_path)
        assert _step_saved(tmp_path) == 5


KILLED_WORKER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from edgeclip.compress.train.train_loop import train
from edgeclip.runtime.errors import InputError
from tests.compress.train.test_train_loop import SETTINGS, _batch, _module, _task

def batch(part):
    if part.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return _batch(part)

task = replace(_task(_module()), batch=batch)
try:
    train(task, replace(SETTINGS, workers=1), Path(sys.argv[1]))
except InputError as error:
    print(error)
"""


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    # In a process of its own: the error is raised by a signal, wherever that process is.
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WORKER, tmp_path / "parts"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("a process that reads pictures was killed"), done.stderr
    assert 1 <= _step_saved(tmp_path / "parts") <= 5  # what was made before may be lost on its way
    assert _equal(_trained(tmp_path / "parts"), _trained(tmp_path / "whole"))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    alone = _trained(tmp_path / "alone")
    assert _equal(_trained(tmp_path / "helped", replace(SETTINGS, workers=workers)), alone)


def _contrast(module: nn.Module) -> TrainTask:
    """A task whose loss compares every item of a batch with every other."""

    def losses(found: Rows, targets: Rows) -> dict[str, Tensor]:
        logits = found["y"] @ found["y"].T + targets["y"]
        return {"total": torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))}

    return replace(_task(module), losses=losses)


def test_a_batch_in_parts_has_the_losses_of_the_whole(tmp_path: Path) -> None:
    logs = []
    for parts in (1, 2, 4):
        module = _module()
        train(_contrast(module), replace(SETTINGS, accumulate=parts), tmp_path / str(parts))
        log = read_log(tmp_path / str(parts) / "log.jsonl")
        logs.append(([line["total"] for line in log], module.get_parameter("weight").detach()))
    for losses, weight in logs[1:]:
        assert losses == pytest.approx(logs[0][0], abs=1e-6)
        torch.testing.assert_close(weight, logs[0][1], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="a batch of 4 cannot be divided among 1 processes in 3"):
        train(_contrast(_module()), replace(SETTINGS, accumulate=3), tmp_path / "3")


def test_dropout_is_the_same_in_every_pass_and_after_a_resume(tmp_path: Path) -> None:
    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    def trained(out: Path, stop: int, parts: int) -> nn.Module:
        torch.manual_seed(0)
        module = Dropping(3, 1)
        settings = replace(SETTINGS, accumulate=parts)
        with contextlib.suppress(InterruptedRunError):
            train(_task(module, at_step=_stop_at(stop)), settings, out)
        train(_task(module), settings, out)
        return module

    whole = trained(tmp_path / "whole", 99, 2)
    assert _equal(trained(tmp_path / "parts", 5, 2), whole)
    assert not _equal(trained(tmp_path / "one", 99, 1), whole)  # it does drop


def test_the_average_of_the_weights_is_kept(tmp_path: Path) -> None:
    settings = replace(SETTINGS, ema=0.5)
    module = _module()
    seen: list[Tensor] = [module.get_parameter("weight").detach().clone()]

    def embed(inputs: Rows) -> Rows:
        seen.append(module.get_parameter("weight").detach().clone())
        return {"y": module(inputs["x"])}

    train(replace(_task(module), embed=embed), settings, tmp_path / "run")
    seen.append(_saved(tmp_path / "run", "weights")["weight"])
    average = seen[0]
    for step, weight in enumerate(seen[2:]):  # those after each step
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(module.get_parameter("weight").detach(), average)
    with pytest.raises(InterruptedRunError):
        train(_task(_module(), at_step=_stop_at(6)), settings, tmp_path / "parts")
    resumed = _module()
    train(_task(resumed), settings, tmp_path / "parts")
    assert _equal(resumed, module)


def test_the_averaged_weights_are_validated(tmp_path: Path) -> None:
    module = _module()
    seen: list[Tensor] = []

    def validate() -> Validation:
        seen.append(module.get_parameter("weight").detach().clone())
        return Validation(score=float(len(seen)), values={}, says="")

    settings = replace(SETTINGS, ema=0.5)
    train(replace(_task(module), validate=validate), settings, tmp_path)
    assert torch.equal(seen[-1], module.get_parameter("weight"))
    assert torch.equal(seen[-1], _saved(tmp_path, "average")["weight"])
    assert not torch.equal(seen[-1], _saved(tmp_path, "weights")["weight"])


@pytest.mark.parametrize("stop", [5, 99])
def test_patience_ends_a_run_early(tmp_path: Path, stop: int) -> None:
    impatient = replace(SETTINGS, patience=2)
    scores = (0.1, 0.9, 0.5, 0.4, 1.0, 1.0)  # after steps 1, 2, 4, 6, 8, 10
    with contextlib.suppress(InterruptedRunError):
        _validated(_module(), tmp_path, scores=scores, at_step=_stop_at(stop), settings=impatient)
    best, _ = _validated(_module(), tmp_path, scores=scores, settings=impatient)
    assert best is not None
    assert (best.step, best.validation.score) == (2, 0.9)
    assert _steps(tmp_path)[-1] == 6
    patient = replace(SETTINGS, patience=3)  # goes on
    best, _ = _validated(_module(), tmp_path, scores=scores, settings=patient)
    assert best is not None
    assert best.step == 10


def test_a_run_that_waits_for_its_data_says_for_which_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def batch(part: BatchPart) -> Batch:
        time.sleep(0.003)
        made = _batch(part)
        return replace(made, seconds={"reading pictures": 0.002, "tokenizing": 0.001})

    long = replace(SETTINGS, steps=120, checkpoint_seconds=1000.0)
    caplog.set_level(logging.WARNING, logger="edgeclip.compress")
    train(replace(_task(_module()), batch=batch), long, tmp_path)
    (message,) = caplog.messages
    assert "of its time for data" in message
    assert "reading pictures 67%, tokenizing 33%" in message


def test_every_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"steps must .*; seed must .*; ema must"):
        TrainSettings(steps=0, seed=-1, ema=1.0)


def test_a_tracker_gets_settings_and_losses(tmp_path: Path) -> None:
    _trained(tmp_path, replace(SETTINGS, track=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "edgeclip")).Reload()
    found = [event.value for event in events.Scalars("total")]
    assert found == pytest.approx([line["total"] for line in read_log(tmp_path / "log.jsonl")])
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert rates == pytest.approx([SETTINGS.rate(step) for step in range(10)])


def test_a_tracker_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tracker is called paper: choose from .*wandb"):
        _trained(tmp_path, replace(SETTINGS, track=("paper",)))
    with pytest.raises(MissingExtraError, match="tracker comet_ml is not installed: pip install"):
        _trained(tmp_path, replace(SETTINGS, track=("comet_ml",)))


SCORES = (0.1, 0.5, 0.9, 0.9, 0.3, 0.2)  # after steps 1, 2, 4, 6, 8, 10


def _validated(
    module: nn.Module,
    out: Path,
    *,
    scores: Sequence[float] = SCORES,
    at_step: Callable[[int], None] = lambda _step: None,
    loss_factor: Callable[[int], float] = lambda _step: 1.0,
    settings: TrainSettings = SETTINGS,
) -> tuple[BestStep | None, dict[int, dict[str, Tensor]]]:
    """Train with scores that are given by step; return the best and the weights at each of them."""
    done: list[int] = []
    seen: dict[int, dict[str, Tensor]] = {}

    def validate() -> Validation:
        assert not module.training
        assert torch.is_inference_mode_enabled()
        step = done[-1] + 1
        seen[step] = {name: value.clone() for name, value in module.state_dict().items()}
        score = scores[step // 2]
        return Validation(score=score, values={"held_out": score}, says=f"score {score}")

    def began(step: int) -> None:
        at_step(step)
        done.append(step)
        assert module.training

    task = _task(module, at_step=began, loss_factor=loss_factor)
    return train(replace(task, validate=validate, validate_every=2), settings, out), seen


def test_the_first_the_last_and_every_so_many_steps_are_validated(tmp_path: Path) -> None:
    _validated(_module(), tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    found = {line["step"]: line["held_out"] for line in log if "held_out" in line}
    assert found == dict(zip((1, 2, 4, 6, 8, 10), SCORES, strict=True))


def test_the_best_step_is_kept_and_the_latest_of_equals(tmp_path: Path) -> None:
    module = _module()
    best, seen = _validated(module, tmp_path)
    assert best is not None
    assert (best.step, best.validation.score) == (6, 0.9)
    assert all(torch.equal(value, seen[6][name]) for name, value in module.state_dict().items())
    assert not torch.equal(seen[6]["weight"], seen[10]["weight"])
    again = _module()
    assert _validated(again, tmp_path)[0] == best  # a finished run
    assert _equal(again, module)


@pytest.mark.parametrize("stop", [1, 5, 7, 9])
def test_the_best_step_outlives_an_interruption(tmp_path: Path, stop: int) -> None:
    whole, parts = _module(), _module()
    expected, _ = _validated(whole, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        _validated(_module(), tmp_path / "parts", at_step=_stop_at(stop))
    assert _validated(parts, tmp_path / "parts")[0] == expected
    assert _equal(parts, whole)
    lines = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    for line in (*lines[0], *lines[1]):
        del line["seconds"]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("later", "best_step"), [((0.5, 0.8), 6), ((0.95, 0.5), 12)])
def test_more_steps_go_on_from_the_last_and_keep_the_best_of_all(
    tmp_path: Path, later: tuple[float, float], best_step: int
) -> None:
    more = replace(SETTINGS, steps=14)
    scores = (*SCORES, *later)
    _, before = _validated(_module(), tmp_path)
    raised = _module()
    best, after = _validated(raised, tmp_path, scores=scores, settings=more)
    assert best is not None
    assert (best.step, best.validation.score) == (best_step, max(scores))
    kept = {**before, **after}[best_step]
    assert all(torch.equal(value, kept[name]) for name, value in raised.state_dict().items())
    assert sorted(after) == [12, 14]
    plain = _module()  # without validations, so nothing but its last step goes on
    train(_task(plain), SETTINGS, tmp_path / "plain")
    train(_task(plain), more, tmp_path / "plain")
    assert all(torch.equal(value, after[14][name]) for name, value in plain.state_dict().items())


def test_validation_changes_no_training(tmp_path: Path) -> None:
    plain, validated = _module(), _module()
    train(_task(plain), SETTINGS, tmp_path / "plain")
    _validated(validated, tmp_path / "validated", scores=(0, 0.1, 0.2, 0.3, 0.4, 0.5))
    assert _equal(plain, validated)


def _falling(step: int) -> float:
    return 0.5**step


def test_a_score_that_falls_with_the_loss_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="edgeclip.compress")
    with pytest.raises(InterruptedRunError):
        _validated(_module(), tmp_path, at_step=_stop_at(9), loss_factor=_falling)
    _validated(_module(), tmp_path, loss_factor=_falling)  # goes on, and does not say it again
    (message,) = caplog.messages
    assert message.startswith(
        "on held-out data step 6 (score 0.9) was better than step 8 (score 0.3), though the loss"
    )


def test_a_score_that_falls_while_the_loss_rises_is_no_surprise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _validated(_module(), tmp_path, loss_factor=lambda step: 3.0**step)
    assert caplog.messages == []


def test_rate_warms_up_and_decays() -> None:
    settings = TrainSettings(steps=100, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert settings.rate(0) == pytest.approx(0.1)  # a tenth, at the top of the cosine
    assert settings.rate(9) == pytest.approx(0.02 + 0.98 * 0.98015, abs=1e-4)  # cos 16.2 degrees
    assert settings.rate(50) == pytest.approx(0.02 + 0.98 / 2)
    assert settings.rate(99) == pytest.approx(0.02, abs=1e-3)
    rates = [settings.rate(step) for step in range(100)]
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_rate_without_warm_up() -> None:
    assert TrainSettings(steps=3, learning_rate=0.5, warmup_steps=0).rate(0) == 0.5


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", (1.0, 0.55, 0.1)), ("constant", (1.0, 1.0, 1.0))]
)
def test_other_schedules(schedule: Schedule, rates: tuple[float, ...]) -> None:
    settings = TrainSettings(
        steps=100, learning_rate=1.0, warmup_steps=0, schedule=schedule, final_rate=0.1
    )
    assert [settings.rate(step) for step in (0, 50, 100)] == pytest.approx(rates)


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "learning_rate", "clip_norm", "checkpoint_seconds"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_settings_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be (above 0|at least 1), got {value}"):
        replace(SETTINGS, **{name: value})  # type: ignore[arg-type]


def _with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def test_a_stopped_run_goes_on_with_its_batch_statistics(tmp_path: Path) -> None:
    whole, stopped = _with_batch_norm(), _with_batch_norm()
    train(_task(whole), SETTINGS, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        train(_task(stopped, at_step=_stop_at(5)), SETTINGS, tmp_path / "stopped")
    resumed = _with_batch_norm()
    train(_task(resumed), SETTINGS, tmp_path / "stopped")
    assert _equal(resumed, whole)
    assert int(whole.state_dict()["1.num_batches_tracked"]) == SETTINGS.steps


@pytest.mark.parametrize(
    ("settings", "mend"),
    [
        (replace(SETTINGS, accumulate=2), "leave out --accumulate"),
        (replace(SETTINGS, gradient_checkpointing=True), "leave out --gradient-checkpointing"),
        (replace(SETTINGS, batch_size=1), "--batch-size of at least 2"),
    ],
)
def test_a_batch_norm_sees_the_whole_batch_once(
    settings: TrainSettings, mend: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=mend):
        train(_task(_with_batch_norm()), settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_candidates_leave_running_statistics_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    seen: list[set[str]] = []

    def embed(inputs: Rows) -> Rows:
        seen.append(set(inputs))
        return {"y": module(inputs["x"])}

    def batch(part: BatchPart) -> Batch:
        made = _batch(part)
        return replace(made, inputs={**made.inputs, "hidden": made.inputs["x"]})

    task = replace(
        _task(module),
        batch=batch,
        embed=embed,
        choose=lambda _found, _targets: torch.tensor([0, 2]),
        not_chosen_by=("hidden",),
    )
    train(task, replace(SETTINGS, steps=1, batch_size=2), tmp_path)
    assert seen == [{"x"}, {"x", "hidden"}]
    norm, rows = module[0], _batch(BatchPart(0, 0, 1)).inputs["x"][[0, 2]]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 1
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(dim=0))
