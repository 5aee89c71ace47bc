"""Read an NVIDIA GPU's clocks, temperature, power and energy through NVML (nvidia-ml-py).

Units are those of NVIDIA's "NVML API Reference Guide". The library itself, libnvidia-ml.so.1,
comes with the driver. On a Jetson it is there from JetPack 6, and reports little: no energy and
no power.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

# Why clocks are lower than they could be, bit by bit (nvmlClocksEventReason...).
_CLOCK_REASONS = {
    0x001: "idle",
    0x002: "set clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}
# The reasons that spoil a measurement; a GPU under load always runs at its power cap.
SLOWDOWNS = frozenset(
    {
        "hardware slowdown",
        "software thermal slowdown",
        "hardware thermal slowdown",
        "power brake",
    }
)
_NO_VALUE = 2**64 - 1


class NvmlGpu:
    """One GPU. A value is None where the GPU or this version of the driver does not report it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, visible: str | None = None) -> "NvmlGpu | None":
        """Open the first GPU of `visible`; None without GPU, driver or the package nvidia-ml-py.

        NVML counts GPUs in the order of their buses, CUDA may count the fastest first: on a
        machine with different GPUs, set CUDA_DEVICE_ORDER=PCI_BUS_ID.

        Args:
            visible: CUDA_VISIBLE_DEVICES: numbers or UUIDs, separated by commas; None or empty
                for the first GPU.
        """
        try:
            import pynvml
        except ImportError:
            return None
        first = (visible or "0").split(",")[0].strip()
        try:
            pynvml.nvmlInit()
            if first.isdecimal():
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first)))
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(first))
        except pynvml.NVMLError:
            return None

    def name(self) -> str | None:
        """Such as "NVIDIA RTX 4000 Ada Generation"."""
        name: str | None = self._ask(self._nvml.nvmlDeviceGetName)
        return name

    def sm_mhz(self) -> int | None:
        """Clock of the multiprocessors, in 10^6 Hz."""
        return self._number(self._nvml.nvmlDeviceGetClockInfo, self._nvml.NVML_CLOCK_SM)

    def memory_mhz(self) -> int | None:
        """Clock of the GPU's memory, in 10^6 Hz."""
        return self._number(self._nvml.nvmlDeviceGetClockInfo, self._nvml.NVML_CLOCK_MEM)

    def temperature_c(self) -> int | None:
        """Of the GPU's die, in degrees Celsius."""
        return self._number(self._nvml.nvmlDeviceGetTemperature, self._nvml.NVML_TEMPERATURE_GPU)

    def power_w(self) -> float | None:
        """Of the whole board in watts: from Ampere on (but GA100) the mean of the last second."""
        milliwatts = self._number(self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1e3

    def energy_mj(self) -> int | None:
        """Of the board since the driver was loaded, in millijoules; from Volta on."""
        return self._number(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def clock_reasons(self) -> tuple[str, ...] | None:
        """Why the clocks are not higher, such as "idle" or "power cap"; empty if nothing is."""
        bits = self._number(self._nvml.nvmlDeviceGetCurrentClocksEventReasons)
        if bits is None:  # its name before driver 535
            bits = self._number(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        if bits is None:
            return None
        return tuple(name for bit, name in _CLOCK_REASONS.items() if bits & bit)

    def slowed_by_heat_ms(self) -> float | None:
        """For how long heat has held the clocks down since the driver was loaded."""
        found = self._ask(
            self._nvml.nvmlDeviceGetViolationStatus, self._nvml.NVML_PERF_POLICY_THERMAL
        )
        if found is None or found.violationTime == _NO_VALUE:
            return None
        return float(found.violationTime / 1e6)

    def _number(self, function: Callable[..., Any], *arguments: int) -> int | None:
        value: int | None = self._ask(function, *arguments)
        return value

    def _ask(self, function: Callable[..., Any], *arguments: int) -> Any:
        """Call a function of NVML for this GPU; None where it answers with an error."""
        try:
            return function(self._handle, *arguments)
        except (self._nvml.NVMLError, UnicodeDecodeError):
            return None


@functools.cache
def this_gpu() -> NvmlGpu | None:
    """The GPU that this process may use first; None where `NvmlGpu.open` finds none."""
    return NvmlGpu.open(os.environ.get("CUDA_VISIBLE_DEVICES"))
