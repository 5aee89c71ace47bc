"""What a config does to the float graph before anything is rounded: the function stays the same."""

import onnx

from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.equalise import equalise
from edgeclip.export.quantizing.smooth import smooth


def apply_transforms(
    model: onnx.ModelProto, config: StaticInt8, data: CalibrationData
) -> onnx.ModelProto:
    """Return a copy that is equalised and smoothed as a config says.

    Equalising comes first: smoothing looks at the weights that it leaves.

    Args:
        model: a tower in fp32, its weights in memory.
        config: says what is done. Biases are corrected later (`correct_biases`).
        data: shows how large the channels become.

    Raises:
        ExportError: a node that is to be smoothed cannot be.
        EngineError: the graph cannot be run here.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if config.equalised:
        equalise(changed)
    if config.smoothing:
        smooth(changed, config.smoothing, data)
    return changed
