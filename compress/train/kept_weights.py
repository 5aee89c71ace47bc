"""The weights that a run keeps: their moving average, and those of its best validation."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

_log = logging.getLogger(__name__)

_WORSE = 0.02  # how much lower than the best a score must be to be warned of

Weights = dict[str, Tensor]


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
class BestStep:
    """The validation of the step whose weights were kept: counted from 1, the latest of equals."""

    step: int
    validation: Validation


class AveragedWeights:
    """The exponential moving average of a module's weights (Polyak averaging).

    Its decay grows to the given one with the first steps, as min(decay, (1 + t) / (10 + t)), so
    that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.weights = {name: value.clone() for name, value in self._own().items()}

    def _own(self) -> Weights:
        return {
            name: value.detach()
            for name, value in self._module.state_dict().items()
            if value.is_floating_point()
        }

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, value in self._own().items():
            self.weights[name].lerp_(value, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the module the averaged weights while the block lasts."""
        before = {name: value.clone() for name, value in self._own().items()}
        self.keep()
        try:
            yield
        finally:
            self._module.load_state_dict(before, strict=False)

    def keep(self) -> None:
        """Give the module the averaged weights."""
        self._module.load_state_dict(self.weights, strict=False)

    def load(self, weights: Weights) -> None:
        """Go on from an average of before."""
        for name, value in weights.items():
            self.weights[name].copy_(value)


class BestWeights:
    """Keeps the weights of the best validation, and warns of what became worse since."""

    def __init__(self, patience: int) -> None:
        self._step = BestStep(step=0, validation=Validation(score=-math.inf, values={}, says=""))
        self.weights: Weights | None = None
        self._loss = math.inf  # mean of the steps that led to the best one
        self._recent, self._count = 0.0, 0  # losses since the last validation: sum, number
        self._patience, self._since = patience, 0  # validations since the best one
        self._warned = False

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many validations were no better that the run is to end."""
        return 0 < self._patience <= self._since

    def add_loss(self, loss: float) -> None:
        """Note the loss of a step."""
        self._recent, self._count = self._recent + loss, self._count + 1

    def compare(self, step: int, found: Validation, module: nn.Module) -> None:
        """Keep the module's weights if its validation after a step is the best so far."""
        loss, self._recent, self._count = self._recent / self._count, 0.0, 0
        best = self._step.validation
        self._since += 1
        if found.score >= best.score:
            self._step = BestStep(step=step, validation=found)
            self.weights = {
                name: value.detach().cpu().clone() for name, value in module.state_dict().items()
            }
            self._loss, self._warned, self._since = loss, False, 0
        elif best.score - found.score > _WORSE and loss < self._loss and not self._warned:
            self._warned = True
            _log.warning(
                "on held-out data step %d (%s) was better than step %d (%s), though the loss fell "
                "from %.3g to %.3g: more data, fewer steps or less --contrastive may help; step %d "
                "is what is kept",
                *(self._step.step, best.says, step, found.says, self._loss, loss, self._step.step),
            )
        if self.is_out_of_patience:
            _log.info(
                "stopped early at step %d: none of %d validations was better than that of step %d",
                *(step, self._since, self._step.step),
            )

    def restore(self, module: nn.Module) -> BestStep | None:
        """Give the module the best weights; None if nothing was validated."""
        if self.weights is None:
            return None
        module.load_state_dict(self.weights)
        return self._step

    def state(self) -> dict[str, Any]:
        """Return all but the weights as plain JSON data."""
        score = self._step.validation.score
        return {
            "step": asdict(self._step) if math.isfinite(score) else None,
            "loss": self._loss if math.isfinite(self._loss) else None,
            "recent": self._recent,
            "count": self._count,
            "since": self._since,
            "warned": self._warned,
        }

    def load(self, state: dict[str, Any], weights: Weights | None) -> None:
        found = state["step"]
        if found is not None:
            validation = Validation(**found["validation"])
            self._step = BestStep(step=found["step"], validation=validation)
        self.weights = weights
        self._loss = math.inf if state["loss"] is None else state["loss"]
        self._recent, self._count = state["recent"], state["count"]
        self._since, self._warned = state["since"], state["warned"]
