"""A tower as torch's exporter captures it: the program in torch beside its ONNX graph."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.exporter_config import tower_config
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.towers import tower_module
from edgeclip.runtime.errors import first_line
from edgeclip.runtime.spec import Tower


def capture(
    dual: DualEncoder, tower: Tower, form: GraphForm, module: nn.Module | None = None
) -> torch.onnx.ONNXProgram:
    """Capture one tower in its standard form, normalised pixels in.

    Args:
        dual: both towers.
        tower: which one.
        form: how it is captured.
        module: what computes it, by default `tower_module`.

    Raises:
        ExportError: torch cannot capture the model.
    """
    config = tower_config(dual, tower, form)
    limits = {"length": {"min": 2, "max": dual.spec.text.context_length}}
    (axes,) = config.inputs.values()
    shapes = {axis: torch.export.Dim(name, **limits.get(name, {})) for axis, name in axes.items()}
    if module is None:
        module = tower_module(dual, tower, patch_features=form.patch_features)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (config.sample().to(dual.device),),
                input_names=list(config.inputs),
                output_names=list(config.outputs),
                opset_version=form.opset,
                dynamic_shapes=(shapes,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many classes, all with a long report
        raise ExportError(f"torch cannot export the {tower} tower: {first_line(error)}") from error
    assert program is not None
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling of optional packages and its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
