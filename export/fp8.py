"""fp8 towers: E4M3 around the products with constant weights, everything else in fp16.

Float8 needs no zero points and loses little to outliers, because its steps grow with the
values. TensorRT computes it on GPUs from Ada on; ONNX Runtime's CPU provider rounds to the
same values and multiplies them in float, so the quality of these graphs can be judged on
any machine. Scales follow from the extremes that calibration saw.

Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433.
"""

from collections.abc import Collection
from pathlib import Path

from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.quantize import quantizable_nodes
from edgeclip.export.symmetric import FLOAT8, write_symmetric


def write_fp8(
    source: Path,
    target: Path,
    data: CalibrationData,
    *,
    kept: Collection[str] = (),
    cache: Path | None = None,
) -> None:
    """Quantize an fp32 tower to float8 by what it sees in `data`.

    The graph is raised to operator set 21, unless its own is higher. Nodes named in `kept`
    are not quantized. `cache` is a folder for ranges that were found, which belongs to this
    data alone.

    Raises:
        ExportError: nothing in the graph can be quantized, or the result is not valid ONNX.
    """
    nodes = [name for name in quantizable_nodes(source) if name not in kept]
    write_symmetric(source, target, data, nodes=nodes, grid=FLOAT8, half=True, cache=cache)
