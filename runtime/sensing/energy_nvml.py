"""Energy of an NVIDIA GPU, as its driver tells it.

The board's own sensor is off by some 5%, and on some GPUs (A100, H100) looks only a quarter of the
time: repeat the work for seconds, and compare rather than trust (Yang, Adamek, Armour, "Accurate
and Convenient Energy Measurements for GPUs", SC 2024). Energy of the processor is not part of it.
Not yet run on a GPU: see `nvml`.
"""

from typing import TypeVar

from edgeclip.runtime.sensing.energy_meter import CountedEnergy, Counter, SampledPower
from edgeclip.runtime.sensing.nvml import NvmlGpu

T = TypeVar("T")
_COVERS = "GPU board"
_LEAST_S = 2.0  # the counter moves about ten times a second, the power is a mean of one second
_PERIOD_S = 0.05
_MILLIJOULES = 1e3


def nvml_meter(gpu: NvmlGpu | None) -> CountedEnergy | SampledPower | str:
    """The GPU's counter of energy, or else its power, or why there is neither."""
    if gpu is None:
        return "no NVIDIA GPU that NVML knows"
    if gpu.energy_mj() is not None:
        meter = CountedEnergy(
            name="NVML energy",
            covers=_COVERS,
            least_s=_LEAST_S,
            counters=(Counter(lambda: _known(gpu.energy_mj())),),
            per_joule=_MILLIJOULES,
        )
        if meter.moves():
            return meter
    if gpu.power_w():
        return SampledPower(
            name="NVML power",
            covers=_COVERS,
            least_s=_LEAST_S,
            watts=lambda: _known(gpu.power_w()),
            period_s=_PERIOD_S,
        )
    return "this GPU tells NVML neither energy nor power"


def _known(value: T | None) -> T:
    if value is None:
        raise ValueError("the driver no longer tells it")
    return value
