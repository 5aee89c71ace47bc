"""The towers as optimum's exporters describe a model: inputs, axes, outputs, dummy inputs."""

from typing import Any

import torch
from optimum.exporters.base import ExporterConfig
from optimum.utils import (
    DummyTextInputGenerator,
    DummyVisionInputGenerator,
    NormalizedTextConfig,
    NormalizedVisionConfig,
)
from torch import Tensor

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.graph_form import GraphForm
from edgeclip.runtime.spec import OUTPUT_NAMES, PATCH_OUTPUT, PIXEL_INPUTS, TEXT_INPUT, Tower

_SAMPLES = 2  # the exporter takes a batch of 1 for a constant
Axes = dict[str, dict[int, str]]


class ImageTowerConfig(ExporterConfig):  # type: ignore[misc] # optimum is untyped
    """An image tower: `pixel_values` to `image_embeds`, and `patch_features` on request."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig.with_args(image_size="size")
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)

    def __init__(self, dual: DualEncoder, form: GraphForm) -> None:
        super().__init__(dual.image_spec, task="feature-extraction")
        self._form = form

    @property
    def inputs(self) -> Axes:
        """Names of the inputs, and of their axes that may vary."""
        return {PIXEL_INPUTS["float32-nchw"]: _batch_axis(self._form)}

    @property
    def outputs(self) -> Axes:
        """The same of the outputs."""
        names = [OUTPUT_NAMES["image"], *([PATCH_OUTPUT] if self._form.patch_features else [])]
        return {name: _batch_axis(self._form) for name in names}

    def sample(self) -> Tensor:
        """One input to trace with, float32 [batch, 3, size, size]."""
        return _sample(self, self._form)


class TextTowerConfig(ExporterConfig):  # type: ignore[misc] # as above
    """A text tower: `input_ids` to `text_embeds`."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    def __init__(self, dual: DualEncoder, form: GraphForm) -> None:
        super().__init__(dual.spec.text, task="feature-extraction")
        self._form = form
        # Any length but the whole context, which the exporter would take for a constant.
        self._length = dual.spec.text.context_length - 1

    @property
    def inputs(self) -> Axes:
        """Names of the inputs, and of their axes that may vary."""
        return {TEXT_INPUT: {**_batch_axis(self._form), 1: "length"}}

    @property
    def outputs(self) -> Axes:
        """The same of the outputs."""
        return {OUTPUT_NAMES["text"]: _batch_axis(self._form)}

    def sample(self) -> Tensor:
        """One input to trace with, int64 [batch, length]."""
        return _sample(self, self._form, sequence_length=self._length)


TowerConfig = ImageTowerConfig | TextTowerConfig


def tower_config(dual: DualEncoder, tower: Tower, form: GraphForm) -> TowerConfig:
    """Describe one tower of `dual` in a form."""
    return ImageTowerConfig(dual, form) if tower == "image" else TextTowerConfig(dual, form)


def _batch_axis(form: GraphForm) -> dict[int, str]:
    return {0: "batch"} if form.batch is None else {}


def _sample(config: Any, form: GraphForm, **sizes: int) -> Tensor:
    made = config.generate_dummy_inputs(batch_size=form.batch or _SAMPLES, **sizes)
    (value,) = made.values()
    assert isinstance(value, torch.Tensor)
    return value
