"""Run a training loop on one process or many, with log, checkpoints and exact resume.

A run is a pure function of its settings: the batch of a step depends on (seed, step) alone, so a
run that was killed and resumed ends with the weights of one that was not (on one CPU), and several
processes give the weights of one, up to rounding (and dropout, where a tower has some).

The losses see the embeddings of a step's whole batch, however it is divided among processes and
parts of a process. Where one process takes its share in several parts, each part is embedded
twice: first without gradients, to have all embeddings; then, when the losses' gradient by the
embeddings is known, with them (GradCache, Gao et al. 2021). So the memory is that of a part, and
the losses are those of the whole.

Only the number of steps may change later. From there on the learning rate is that of a run of the
new number of steps: raised after its end, it rises again, and decays once more (a warm
restart).
"""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from tqdm import tqdm

from edgeclip.compress.compute import ComputeType, autocast, compute_dtype
from edgeclip.compress.data.loader import default_workers, killed_workers_explained, load
from edgeclip.compress.processes import Processes, processes
from edgeclip.compress.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from edgeclip.compress.train.kept_weights import (
    AveragedWeights,
    BestStep,
    BestWeights,
    Validation,
)
from edgeclip.compress.train.optimizers import Muon, adamw, linear_matrices
from edgeclip.compress.train.trackers import Trackers
from edgeclip.runtime.bundle.files import atomic_file, require_space
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.errors import ConfigError

_log = logging.getLogger(__name__)

Rows = dict[str, Tensor]  # tensors by name, each with a row for every item of a batch
Schedule = Literal["cosine", "linear", "constant"]

_WINDOW = 50  # steps over which waiting is told
_SLOW = 0.3  # share of the time that a run may wait for its data without saying so


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of a run.

    Args:
        steps: number of steps.
        batch_size: items of a step, over all processes.
        optimizer: `adamw`, or `muon` for the matrices of linear layers and AdamW for all else.
        learning_rate: that of AdamW at its highest, after the warm-up.
        matrix_rate: that of Muon.
        schedule: how they fall after `warmup_steps` of linear rise: `cosine` or `linear` to
            `final_rate` of it at the last step, or `constant`.
        weight_decay: of matrices; biases, norms and scales have none.
        clip_norm: the largest norm of the gradient.
        seed: of the order of the data.
        compute: the number format of products, see `autocast`.
        accumulate: parts of a process's share that are embedded one after the other.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        compile: compile the towers with `torch.compile`.
        ema: decay of the moving average of weights that is validated and kept; 0 for none.
        validations: number of validations, besides that of the first step.
        patience: end after so many validations without a better one; 0 for never.
        checkpoint_seconds: time between two checkpoints.
        workers: processes that make batches; None for `default_workers`, 0 for none.
        track: names of trackers of accelerate that the log is sent to.
    """

    steps: Annotated[int, Ge(1)] = 2000
    batch_size: Annotated[int, Ge(1)] = 128
    optimizer: Literal["adamw", "muon"] = "muon"
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    matrix_rate: Annotated[float, Gt(0)] = 0.02
    schedule: Schedule = "linear"
    final_rate: Annotated[float, Ge(0), Le(1)] = 0.02
    weight_decay: Annotated[float, Ge(0)] = 0.05
    warmup_steps: Annotated[int, Ge(0)] = 60
    clip_norm: Annotated[float, Gt(0)] = 1.0
    seed: Annotated[int, Ge(0)] = 0
    compute: ComputeType = "auto"
    accumulate: Annotated[int, Ge(1)] = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    validations: Annotated[int, Ge(1)] = 20
    patience: Annotated[int, Ge(0)] = 0
    checkpoint_seconds: Annotated[float, Gt(0)] = 120.0
    workers: Annotated[int | None, Ge(0)] = None
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_bounds(self)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def rate(self, step: int) -> float:
        """Return AdamW's learning rate of `step` (0-based)."""
        return self.learning_rate * self.rate_factor(step)

    def rate_factor(self, step: int) -> float:
        """Return what multiplies the highest learning rates at `step`."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = {
            "cosine": (1 + math.cos(math.pi * step / self.steps)) / 2,
            "linear": 1 - step / self.steps,
            "constant": 1.0,
        }[self.schedule]
        return warmup * (self.final_rate + (1 - self.final_rate) * left)


# These change no weight, or at most its rounding.
_FREE = {"checkpoint_seconds", "workers", "track", "patience", "accumulate"}
_FREE |= {"gradient_checkpointing", "compile"}


@dataclass(frozen=True, slots=True)
class BatchPart:
    """Part `number` of `count` equal parts of the batch of a step, all counted from 0."""

    step: int
    number: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A part of a step's batch, in tensors on the CPU that all have a row for each item.

    Attributes:
        inputs: what is embedded.
        targets: what the losses need besides embeddings; those of all parts are joined.
        seconds: time spent on making it, by the name of the stage.
        bad: items that could not be read, by their number, with the reason.
    """

    inputs: Rows
    targets: Rows = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTask:
    """A module to train, with its batches and losses.

    Args:
        title: the name for the progress bar.
        module: holds all weights to train.
        batch: makes a part of a step's batch, in a worker process.
        embed: runs the module on inputs; returns tensors with a row for each item.
        losses: returns the named losses of a whole batch's embeddings and targets, float32; `total`
            is minimised. It has no weights of its own: what it needs of them is embedded.
        identity: names data, teacher and student; resuming with another identity is refused.
        validate: measures the module, in evaluation mode and without gradients; None for never.
        validate_every: steps between two validations, at least; the first and the last step are
            always validated.
        note_bad: is told of items that could not be read; it may raise.
        choose: returns which rows of a part are trained on, int64, of their embeddings and targets;
            the batch then makes more rows than it has, and as many of each part are chosen. None
            to train on all.
        not_chosen_by: names of inputs that are not embedded for this choice.
        begin: is called once it is known that the run may begin or go on, in the first process.
    """

    title: str
    module: nn.Module
    batch: Callable[[BatchPart], Batch]
    embed: Callable[[Rows], Rows]
    losses: Callable[[Rows, Rows], dict[str, Tensor]]
    identity: str
    validate: Callable[[], Validation] | None = None
    validate_every: int = 1
    note_bad: Callable[[dict[int, str]], None] = lambda _bad: None
    choose: Callable[[Rows, Rows], Tensor] | None = None
    not_chosen_by: tuple[str, ...] = ()
    begin: Callable[[], None] = lambda: None


def train(task: TrainTask, settings: TrainSettings, out: Path) -> BestStep | None:
    """Train `task.module` in place, or go on from the checkpoint in `out`.

    Writes `log.jsonl` (a line a step: step, seconds, every loss, and the values of a validation)
    and `checkpoint-STEP`, and leaves both when done. The module ends with the weights of the best
    validation, or of the last step if there is none. A score that falls while the loss falls too
    is warned of, and so is a run that waits for its data.

    Raises:
        ConfigError: `out` holds a run with other settings or more steps, is not the same directory
            for all processes, the batch cannot be divided, or must not be, for the module has batch
            normalisation, or the loss is not finite.
        InputError: the disk is full; the last checkpoint is kept whole.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step in hand was saved.
    """
    team = processes()
    parts = team.count * settings.accumulate
    if settings.batch_size % parts:
        raise ConfigError(
            f"a batch of {settings.batch_size} cannot be divided among {team.count} processes in "
            f"{settings.accumulate} parts each: choose a multiple of {parts}"
        )
    check_batch_norm(task.module, settings, team)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(task, settings, out, team)
    start, seconds = run.resume()
    if team.any(start != team.from_first(start))[0]:
        raise ConfigError(
            f"the processes see other checkpoints in {out}: give a --run on a disk that all "
            "machines share"
        )
    if team.is_first:
        task.begin()
    team.wait()  # until all have read the log that is written from here on
    own = range(team.number * settings.accumulate, (team.number + 1) * settings.accumulate)
    keys = (
        BatchPart(step, number, parts) for step in range(start, settings.steps) for number in own
    )
    workers = default_workers() if settings.workers is None else settings.workers
    batches = load(task.batch, keys, workers=workers)
    task.module.train()
    bar: tqdm[Any] = tqdm(
        total=settings.steps * settings.batch_size,
        initial=start * settings.batch_size,
        desc=task.title,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not team.shows_bars,
    )
    clock, shown = _RunClock(seconds), ""
    waiting = _Waiting(workers)
    with (
        killed_workers_explained(),
        closing(batches),
        bar,
        _log_file(out / "log.jsonl", team) as log,
        Trackers(settings.track, out) as trackers,
        _stop_on_signal() as stop,
    ):
        trackers.begin({"task": task.title, **asdict(settings)})
        for step in range(start, start if run.is_out_of_patience else settings.steps):
            with waiting.for_data():
                batch = [next(batches) for _ in own]
            for part in batch:
                waiting.add_stages(part.seconds)
                task.note_bad(part.bad)
            values = run.step(step, batch)
            validation = run.validated(step)
            if validation is not None:
                shown = f", {validation.says}"
                values |= validation.values
            line = {"step": step + 1, "seconds": clock.now(), **values}
            log.write(json.dumps(line) + "\n")
            trackers.log({**line, "learning_rate": settings.rate(step)}, step + 1)
            bar.update(settings.batch_size)
            says = f"loss={values['total']:.3f}{shown}{waiting.says()}"
            bar.set_postfix_str(says, refresh=False)
            waiting.warn(step - start)
            # One clock: else each process would ask for a checkpoint of its own.
            is_due = team.is_first and clock.due(settings.checkpoint_seconds)
            is_stopped, is_due = team.any(stop.is_set, is_due)
            is_last = step + 1 == settings.steps or run.is_out_of_patience
            if is_stopped or is_last or is_due:
                log.flush()
                run.save(step + 1, clock.now())
            if is_last:
                break
            if is_stopped:
                raise KeyboardInterrupt(f"stopped at step {step + 1}; run it again to go on")
    task.module.eval()
    return run.finish()


class _Run:
    """The module, the optimizers and the best weights of a run, from step to step."""

    def __init__(
        self, task: TrainTask, settings: TrainSettings, out: Path, team: Processes
    ) -> None:
        self._task, self._settings, self._out, self._team = task, settings, out, team
        self._weights = [p for p in task.module.parameters() if p.requires_grad]
        self._device = self._weights[0].device
        # All weights, those of the best step and their average, and two numbers of AdamW for each
        # that is trained; written beside the checkpoint before.
        state = sum(value.nbytes for value in task.module.state_dict().values())
        require_space(out, 3 * state + 2 * sum(weight.nbytes for weight in self._weights))
        self._optimizers = _optimizers(task.module, settings, self._device)
        self._average = AveragedWeights(task.module, settings.ema) if settings.ema else None
        self._best = BestWeights(settings.patience)
        self._embed = torch.compile(task.embed) if settings.compile else task.embed

    @property
    def is_out_of_patience(self) -> bool:
        return self._best.is_out_of_patience

    def step(self, step: int, parts: list[Batch]) -> dict[str, float]:
        """Take one step; return its losses."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self._settings.rate_factor(step)
            optimizer.zero_grad(set_to_none=True)
        losses = self._gradients(step, parts)
        self._team.sum_gradients(self._weights)
        norm = nn.utils.clip_grad_norm_(self._weights, self._settings.clip_norm)
        _check_finite(losses["total"], norm, step)
        for optimizer in self._optimizers:
            optimizer.step()
        if self._average is not None:
            self._average.update(step)
        values = {name: value.item() for name, value in losses.items()}
        self._best.add_loss(values["total"])
        return values

    def _gradients(self, step: int, parts: list[Batch]) -> dict[str, Tensor]:
        """Give every weight the gradient of its share of the whole batch's loss."""
        inputs = [self._moved(part.inputs) for part in parts]
        held = [self._moved(part.targets) for part in parts]
        if self._task.choose is not None:
            for number, (given, targets) in enumerate(zip(inputs, held, strict=True)):
                rows = self._chosen(self._task.choose, given, targets, step, number)
                inputs[number] = {name: own[rows] for name, own in given.items()}
                held[number] = {name: own[rows] for name, own in targets.items()}
        found: list[Rows] = []
        for number, given in enumerate(inputs):
            with torch.set_grad_enabled(len(parts) == 1):
                found.append(self._embedded(given, step, number))
        ours = {
            name: torch.cat([rows[name].detach() for rows in found]).requires_grad_()
            for name in found[0]
        }
        targets = {
            name: self._team.gather(torch.cat([rows[name] for rows in held])) for name in held[0]
        }
        losses = self._task.losses(
            {name: self._joined(rows) for name, rows in ours.items()}, targets
        )
        gradients = torch.autograd.grad(losses["total"], list(ours.values()), allow_unused=True)
        for number, given in enumerate(inputs):
            if len(parts) > 1:
                found[number] = self._embedded(given, step, number)
            pairs = [
                (rows, gradient.chunk(len(parts))[number])
                for name, gradient in zip(ours, gradients, strict=True)
                if gradient is not None and (rows := found[number][name]).requires_grad
            ]
            if pairs:
                torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
            found[number] = {}
        return {name: value.detach() for name, value in losses.items()}

    def _chosen(
        self,
        choose: Callable[[Rows, Rows], Tensor],
        inputs: Rows,
        targets: Rows,
        step: int,
        number: int,
    ) -> Tensor:
        """Choose rows of a part; running statistics do not see those that are not trained on."""
        shown = {name: own for name, own in inputs.items() if name not in self._task.not_chosen_by}
        self._task.module.eval()
        with torch.no_grad():
            rows = choose(self._embedded(shown, step, number), targets)
        self._task.module.train()
        return rows

    def _embedded(self, inputs: Rows, step: int, number: int) -> Rows:
        # So that dropout is the same each time that a part is embedded, and after a resume.
        place = self._team.number * self._settings.accumulate + number
        seed = np.random.SeedSequence((self._settings.seed, step, place)).generate_state(1)
        torch.manual_seed(int(seed[0]))
        with autocast(self._settings.compute, self._device):
            return self._embed(inputs)

    def _joined(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes; gradients reach those of this one."""
        if self._team.count == 1:
            return rows
        every = list(self._team.gather(rows).chunk(self._team.count))
        every[self._team.number] = rows
        return torch.cat(every)

    def _moved(self, rows: Rows) -> Rows:
        return {name: value.to(self._device, non_blocking=True) for name, value in rows.items()}

    def validated(self, step: int) -> Validation | None:
        """Validate the module if it is time to; `step` counts from 0."""
        task, last = self._task, self._settings.steps - 1
        if task.validate is None:
            return None
        every = max(1, self._settings.steps // self._settings.validations, task.validate_every)
        if (step + 1) % every and step not in (0, last):
            return None
        found = None
        with self._averaged():
            if self._team.is_first:
                task.module.eval()
                with torch.inference_mode():
                    found = task.validate()
                task.module.train()
            found = self._team.from_first(found)
            assert found is not None
            self._best.compare(step + 1, found, task.module)
        return found

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Use the averaged weights, if there are any, while the block lasts."""
        if self._average is None:
            yield
            return
        with self._average.in_place():
            yield

    def finish(self) -> BestStep | None:
        """Give the module the best weights, or the averaged ones; return the best step."""
        if self._average is not None:
            self._average.keep()
        return self._best.restore(self._task.module)

    @property
    def _identity(self) -> str:
        settings = {k: v for k, v in asdict(self._settings).items() if k not in _FREE}
        return json.dumps({"identity": self._task.identity, "settings": settings}, sort_keys=True)

    def save(self, step: int, seconds: float) -> None:
        if self._team.is_first:
            tensors: dict[str, Any] = {
                "weights": self._task.module.state_dict(),
                "optimizer": optimizer_tensors(self._optimizers),
            }
            if self._average is not None:
                tensors["average"] = self._average.weights
            if self._best.weights is not None:
                tensors["best"] = self._best.weights
            values = {
                "run": self._identity,
                "step": step,
                "seconds": seconds,
                "best": self._best.state(),
            }
            save_checkpoint(self._out, step, Checkpoint(values=values, tensors=tensors))
        self._team.wait()

    def resume(self) -> tuple[int, float]:
        """Load the checkpoint; return steps done and seconds spent, (0, 0.0) for a new run."""
        saved = load_checkpoint(self._out)
        log = self._out / "log.jsonl"
        if saved is None:
            if self._team.is_first:
                log.unlink(missing_ok=True)
            return 0, 0.0
        values = saved.values
        self._check_run(values)
        self._task.module.load_state_dict(saved.tensors["weights"])
        load_optimizer_tensors(self._optimizers, saved.tensors["optimizer"])
        if self._average is not None:
            self._average.load(saved.tensors["average"])
        self._best.load(values["best"], saved.tensors.get("best"))
        if self._team.is_first:
            written = log.read_text(encoding="utf-8") if log.exists() else ""
            lines = written.splitlines()[: values["step"]]
            with atomic_file(log) as path:  # lines past the checkpoint will be written again
                path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return int(values["step"]), float(values["seconds"])

    def _check_run(self, values: dict[str, Any]) -> None:
        before = json.loads(values["run"])
        steps, wanted = before["settings"]["steps"], self._settings.steps
        now = json.loads(self._identity)
        before["settings"]["steps"] = wanted
        if before != now:
            other = sorted(
                name.replace("_", "-")
                for name in set(before["settings"]) | set(now["settings"])
                if before["settings"].get(name) != now["settings"].get(name)
            )
            what = f"settings ({', '.join(other)})" if other else "data, teacher or student"
            raise ConfigError(
                f"{self._out} holds a run with other {what}; choose another --out, "
                f"or delete it to start again"
            )
        if values["step"] > wanted:
            raise ConfigError(
                f"{self._out} holds a run that has done {values['step']} steps: give at least as "
                "many, or choose another --out"
            )
        if steps != wanted:
            _log.info(
                "the run was of %d steps and is of %d now: its learning rate goes on from step %d "
                "as in a run of %d",
                *(steps, wanted, values["step"] + 1, wanted),
            )


def check_batch_norm(
    module: nn.Module, settings: TrainSettings, team: Processes, *, masked: bool = False
) -> None:
    """Refuse to divide a batch, or to embed it twice, where a norm is one over the whole batch.

    A part has other statistics than the batch, so that the losses would not be those of the whole;
    and what is embedded twice moves the running statistics twice, `masked` pictures to what no
    picture is like.

    Raises:
        ConfigError: the message says what to leave out.
    """
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        return
    mend = {
        "leave out --accumulate": settings.accumulate > 1,
        "leave out --gradient-checkpointing": settings.gradient_checkpointing,
        "leave out --masked": masked,
        "train in one process": team.count > 1,
        "choose a --batch-size of at least 2": settings.batch_size < 2,
    }
    wanted = [say for say, is_needed in mend.items() if is_needed]
    if wanted:
        raise ConfigError(
            "the student has BatchNorm, whose statistics are those of one whole batch, embedded "
            f"once: {', and '.join(wanted)}, or choose a family without it, such as convnextv2"
        )


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


class _Waiting:
    """Measures how long a run waits for its data, and which stage of making them is slowest.

    Over the last steps, for data come in bursts.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._steps: list[tuple[float, float]] = []  # waited, in all
        self._stages: dict[str, float] = {}
        self._last = time.monotonic()
        self._warned = False

    @contextmanager
    def for_data(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        now = time.monotonic()
        self._steps = [*self._steps[1 - _WINDOW :], (now - begin, now - self._last)]
        self._last = now

    def add_stages(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self._stages[name] = self._stages.get(name, 0.0) + value

    @property
    def _share(self) -> float:
        waited, whole = map(sum, zip(*self._steps, strict=True))
        return float(waited / whole) if whole else 0.0

    @property
    def _slowest(self) -> str:
        return max(self._stages, key=lambda name: self._stages[name], default="making batches")

    def says(self) -> str:
        """Say what share of the last steps went into waiting for data, and if much, for which."""
        slow = f" ({self._slowest})" if self._share > _SLOW else ""
        return f", waits {self._share:.0%}{slow}"

    def warn(self, step: int) -> None:
        """Warn once, when the first batches, which come late, are behind."""
        if self._warned or step < 2 * _WINDOW or self._share <= _SLOW:
            return
        self._warned = True
        whole = sum(self._stages.values())
        stages = ", ".join(f"{name} {part / whole:.0%}" for name, part in self._stages.items())
        _log.warning(
            "the run waits %.0f%% of its time for data, of whose making the parts are %s: more "
            "than %d --workers, smaller pictures or a faster disk would help",
            *(100 * self._share, stages, self._workers),
        )


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
    """A flag that the first Ctrl-C or SIGTERM sets; a second one interrupts at once."""

    is_set = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def _stop_on_signal() -> Iterator[_StopFlag]:
    stop = _StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log_file(path: Path, team: Processes) -> Iterator[TextIO]:
    """Open the log to append to it; that of other processes than the first is thrown away."""
    with Path(path if team.is_first else os.devnull).open("a", encoding="utf-8") as file:
        yield file


def _optimizers(
    module: nn.Module, settings: TrainSettings, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a module's weights; `initial_lr` is the highest rate of a group."""
    matrices = linear_matrices(module) if settings.optimizer == "muon" else []
    known = set(map(id, matrices))
    rest = [own for own in module.parameters() if own.requires_grad and id(own) not in known]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            Muon(
                matrices,
                learning_rate=settings.matrix_rate,
                weight_decay=settings.weight_decay,
                matmul_dtype=compute_dtype(settings.compute, device),
            )
        )
    if rest:
        rate, decay = settings.learning_rate, settings.weight_decay
        made.append(adamw(rest, learning_rate=rate, weight_decay=decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made
