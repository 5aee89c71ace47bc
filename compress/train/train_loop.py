"""Run a training loop with log, checkpoints, exact resume and safe interruption.

A run is a pure function of its settings: batch `step` depends on (seed, step) alone, so a
run that was killed and resumed ends with the weights of one that was not (on one CPU).

Only the number of steps may change later. From there on the learning rate is that of a run of the
new number of steps: raised at the end of a cosine, it rises again, and decays once more (a warm
restart).
"""

import json
import logging
import math
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TextIO, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from edgeclip.compress.compute import ComputeType, autocast
from edgeclip.runtime.bundle.files import atomic_file, require_space
from edgeclip.runtime.errors import ConfigError

_log = logging.getLogger(__name__)

Batch = TypeVar("Batch")


_WORSE = 0.02  # how much lower than the best a score must be to be warned of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of a run (AdamW, linear warm-up, cosine decay to 2%)."""

    steps: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    clip_norm: float = 1.0
    seed: int = 0
    compute: ComputeType = "auto"
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "clip_norm", "checkpoint_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")

    def rate(self, step: int) -> float:
        """Return the learning rate of `step` (0-based)."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * warmup * (0.02 + 0.98 * cosine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What a module reaches on data held out of training.

    Attributes:
        score: the higher, the better; the step of the highest is kept.
        values: what the log holds of it, by name.
        says: the same in a few words, for the progress bar.
    """

    score: float
    values: dict[str, float]
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTask(Generic[Batch]):
    """A module to train, with its batches and losses.

    Args:
        title: the name for the progress bar.
        module: holds all weights to train.
        batch: makes the batch of a step; runs in its own thread, one step ahead.
        losses: returns the named losses of a batch; `total` is minimised.
        identity: names data, teacher and student; resuming with another identity is refused.
        validate: measures the module, in evaluation mode and without gradients; None for never.
        validate_every: steps between two validations; the first and the last step are always
            validated.
    """

    title: str
    module: nn.Module
    batch: Callable[[int], Batch]
    losses: Callable[[Batch], dict[str, Tensor]]
    identity: str
    validate: Callable[[], Validation] | None = None
    validate_every: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BestStep:
    """The validation of the step whose weights were kept: counted from 1, the latest of equals."""

    step: int
    validation: Validation


def train(task: TrainTask[Batch], settings: TrainSettings, out: Path) -> BestStep | None:
    """Train `task.module` in place, or go on from the checkpoint in `out`.

    Writes `log.jsonl` (a line a step: step, seconds, every loss, and the values of a validation)
    and `checkpoint.pt`, and leaves both when done. The module ends with the weights of the best
    validation, or of the last step if there is none. A score that falls while the loss falls too
    is warned of.

    Raises:
        ConfigError: `out` holds a run with other settings or more steps, or the loss is not finite.
        InputError: the disk is full; the last checkpoint is kept whole.
        KeyboardInterrupt: Ctrl-C, after the step in hand was saved.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = [p for p in task.module.parameters() if p.requires_grad]
    # All weights, those of the best step, and two numbers of AdamW for each that is trained;
    # written beside the checkpoint before.
    state = sum(value.nbytes for value in task.module.state_dict().values())
    require_space(out, 2 * state + 2 * sum(weight.nbytes for weight in weights))
    optimizer = _optimizer(weights, settings)
    best = _Best()
    checkpoint = _Checkpoint(out, task, settings, optimizer, best)
    start, seconds = checkpoint.resume()
    bar = tqdm(
        total=settings.steps * settings.batch_size,
        initial=start * settings.batch_size,
        desc=task.title,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
    )
    task.module.train()
    clock, shown = _RunClock(seconds), ""
    with bar, (out / "log.jsonl").open("a", encoding="utf-8") as log, _stop_on_interrupt() as stop:
        for step, batch in _prefetched(task.batch, start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            with autocast(settings.compute, weights[0].device):
                losses = task.losses(batch)
            optimizer.zero_grad(set_to_none=True)
            losses["total"].backward()
            norm = nn.utils.clip_grad_norm_(weights, settings.clip_norm)
            _check_finite(losses["total"], norm, step)
            optimizer.step()
            values = {name: value.item() for name, value in losses.items()}
            best.add_loss(values["total"])
            validation = _validated(task, step, settings.steps)
            if validation is not None:
                best.compare(step + 1, validation, task.module)
                shown = f", {validation.says}"
                values |= validation.values
            _write_line(log, {"step": step + 1, "seconds": clock.now(), **values})
            bar.update(settings.batch_size)
            bar.set_postfix_str(f"loss={values['total']:.3f}{shown}", refresh=False)
            if stop.is_set or step + 1 == settings.steps or clock.due(settings.checkpoint_seconds):
                log.flush()
                checkpoint.save(step + 1, clock.now())
            if stop.is_set and step + 1 < settings.steps:
                raise KeyboardInterrupt(f"stopped at step {step + 1}; run it again to go on")
    task.module.eval()
    return best.restore(task.module)


def _validated(task: TrainTask[Batch], step: int, steps: int) -> Validation | None:
    """Validate the module if it is time to; `step` counts from 0."""
    if task.validate is None:
        return None
    if (step + 1) % task.validate_every and step not in (0, steps - 1):
        return None
    task.module.eval()
    with torch.inference_mode():
        found = task.validate()
    task.module.train()
    return found


class _Best:
    """Keeps the weights of the best validation, and warns of what became worse since."""

    def __init__(self) -> None:
        self._step = BestStep(step=0, validation=Validation(score=-math.inf, values={}, says=""))
        self._weights: dict[str, Tensor] | None = None
        self._loss = math.inf  # mean of the steps that led to the best one
        self._recent, self._count = 0.0, 0  # losses since the last validation: sum, number
        self._warned = False

    def add_loss(self, loss: float) -> None:
        self._recent, self._count = self._recent + loss, self._count + 1

    def compare(self, step: int, found: Validation, module: nn.Module) -> None:
        loss, self._recent, self._count = self._recent / self._count, 0.0, 0
        best = self._step.validation
        if found.score >= best.score:
            self._step = BestStep(step=step, validation=found)
            self._weights = {
                name: value.detach().cpu().clone() for name, value in module.state_dict().items()
            }
            self._loss, self._warned = loss, False
        elif best.score - found.score > _WORSE and loss < self._loss and not self._warned:
            self._warned = True
            _log.warning(
                "on held-out data step %d (%s) was better than step %d (%s), though the loss fell "
                "from %.3g to %.3g: more data, fewer steps or less --contrastive may help; step %d "
                "is what is kept",
                *(self._step.step, best.says, step, found.says, self._loss, loss, self._step.step),
            )

    def restore(self, module: nn.Module) -> BestStep | None:
        """Give the module the best weights; None if nothing was validated."""
        if self._weights is None:
            return None
        module.load_state_dict(self._weights)
        return self._step

    def state(self) -> dict[str, Any]:
        return {
            "step": asdict(self._step),
            "weights": self._weights,
            "loss": self._loss,
            "recent": self._recent,
            "count": self._count,
            "warned": self._warned,
        }

    def load(self, state: dict[str, Any]) -> None:
        found = state["step"]
        self._step = BestStep(step=found["step"], validation=Validation(**found["validation"]))
        self._weights, self._loss = state["weights"], state["loss"]
        self._recent, self._count = state["recent"], state["count"]
        self._warned = state["warned"]


def _check_finite(loss: Tensor, norm: Tensor, step: int) -> None:
    """Refuse a loss or gradient that is not finite, before it reaches weights and checkpoint."""
    for name, value in (("loss", loss), ("gradient's norm", norm)):
        if not torch.isfinite(value):
            raise ConfigError(
                f"the {name} is {value.item()} at step {step + 1}: lower the learning rate "
                f"and start again in an empty directory"
            )


def read_log(path: Path) -> tuple[dict[str, float], ...]:
    """Read the lines of a `log.jsonl`."""
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True, slots=True)
class _Checkpoint(Generic[Batch]):
    """Saves and loads `checkpoint.pt`: weights, optimizer, best step, step, identity of a run."""

    out: Path
    task: TrainTask[Batch]
    settings: TrainSettings
    optimizer: torch.optim.Optimizer
    best: _Best

    @property
    def _path(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def _run(self) -> str:
        settings = asdict(self.settings)
        del settings["checkpoint_seconds"]  # changes no weight
        return json.dumps({"identity": self.task.identity, "settings": settings}, sort_keys=True)

    def save(self, step: int, seconds: float) -> None:
        with atomic_file(self._path) as path:
            torch.save(
                {
                    "run": self._run,
                    "step": step,
                    "seconds": seconds,
                    "weights": self.task.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "best": self.best.state(),
                },
                path,
            )

    def resume(self) -> tuple[int, float]:
        """Load the checkpoint; return steps done and seconds spent, (0, 0.0) for a new run."""
        log = self.out / "log.jsonl"
        if not self._path.exists():
            log.unlink(missing_ok=True)
            return 0, 0.0
        saved = self._read()
        before = json.loads(saved["run"])
        steps = before["settings"]["steps"]
        before["settings"]["steps"] = self.settings.steps
        if before != json.loads(self._run):
            raise ConfigError(
                f"{self.out} holds a run with other settings or data; choose another --out, "
                f"or delete it to start again"
            )
        if saved["step"] > self.settings.steps:
            raise ConfigError(
                f"{self.out} holds a run that has done {saved['step']} steps: give at least as "
                "many, or choose another --out"
            )
        if steps != self.settings.steps:
            _log.info(
                "the run was of %d steps and is of %d now: its learning rate goes on from step %d "
                "as in a run of %d",
                *(steps, self.settings.steps, saved["step"] + 1, self.settings.steps),
            )
        self.task.module.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if "best" in saved:  # not in a checkpoint of before there were validations
            self.best.load(saved["best"])
        lines = log.read_text(encoding="utf-8").splitlines()[: saved["step"]]
        with atomic_file(log) as path:  # lines past the checkpoint will be written again
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return int(saved["step"]), float(saved["seconds"])

    def _read(self) -> dict[str, Any]:
        message = f"{self._path} is damaged; delete it to start again"
        try:
            with zipfile.ZipFile(self._path) as archive:
                if archive.testzip() is not None:  # torch does not look at the checksums
                    raise ConfigError(message)
            saved: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip and pickle raise many kinds on damaged data
            raise ConfigError(message) from error
        return saved


class _RunClock:
    """Counts the seconds of a run, over all its resumes, and since the last checkpoint."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._start = self._saved = time.monotonic()

    def now(self) -> float:
        return round(self._before + time.monotonic() - self._start, 3)

    def due(self, every: float) -> bool:
        if time.monotonic() - self._saved < every:
            return False
        self._saved = time.monotonic()
        return True


class _StopFlag:
    """A flag that the first Ctrl-C sets; a second Ctrl-C interrupts at once."""

    is_set = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def _stop_on_interrupt() -> Iterator[_StopFlag]:
    stop = _StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _prefetched(
    batch: Callable[[int], Batch], start: int, stop: int
) -> Iterator[tuple[int, Batch]]:
    """Yield the batches in order, each made while the one before is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(batch, start) if start < stop else None
        for step in range(start, stop):
            assert waiting is not None
            ready = waiting.result()
            waiting = pool.submit(batch, step + 1) if step + 1 < stop else None
            yield step, ready


def _optimizer(weights: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    groups = [  # biases, norms and scales are not decayed
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _write_line(log: TextIO, values: dict[str, float]) -> None:
    log.write(json.dumps(values) + "\n")
