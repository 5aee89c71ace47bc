"""An NVIDIA GPU as its driver's own library tells of it (NVML), without any package.

Sources: NVIDIA's "NVML API Reference Guide" and `nvml.h` for numbers, units and structures.
`libnvidia-ml.so.1` comes with the driver. On a Jetson it is there from JetPack 6, and tells
little: no energy and no power. Tested against a library in C calling conventions that answers
as the reference says; not yet run on a GPU.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_SM_CLOCK, _MEMORY_CLOCK = 1, 2
_GPU_TEMPERATURE = 0
_THERMAL_POLICY = 1
_NO_VALUE = 2**64 - 1
# Why clocks are lower than they could be, bit by bit (nvmlClocksEventReason...).
_REASONS = {
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
# A power cap is how a GPU always runs under load; these are not.
SLOWDOWNS = frozenset(
    {
        "hardware slowdown",
        "software thermal slowdown",
        "hardware thermal slowdown",
        "power brake",
    }
)


class _Violation(ctypes.Structure):
    _fields_ = (("reference_us", ctypes.c_ulonglong), ("violation_ns", ctypes.c_ulonglong))


class NvmlGpu:
    """One GPU. What its driver does not tell, or this version of it does not know, is None."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def open(cls, library: Any, visible: str | None = None) -> "NvmlGpu | None":
        """The first GPU of `visible`, which is CUDA_VISIBLE_DEVICES; None if it cannot be had.

        NVML counts GPUs in the order of their buses, CUDA may count the fastest first: on a
        machine with different GPUs, set CUDA_DEVICE_ORDER=PCI_BUS_ID.

        Args:
            library: NVML, loaded by ctypes.
            visible: numbers or UUIDs, separated by commas; None or empty for the first GPU.
        """
        if _call(library, "nvmlInit_v2") != _SUCCESS:
            return None
        handle, first = ctypes.c_void_p(), (visible or "0").split(",")[0].strip()
        if first.isdecimal():
            code = _call(
                library,
                "nvmlDeviceGetHandleByIndex_v2",
                ctypes.c_uint(int(first)),
                ctypes.byref(handle),
            )
        else:
            code = _call(
                library,
                "nvmlDeviceGetHandleByUUID",
                ctypes.c_char_p(first.encode()),
                ctypes.byref(handle),
            )
        return cls(library, handle) if code == _SUCCESS else None

    def name(self) -> str | None:
        """Such as "NVIDIA RTX 4000 Ada Generation"."""
        text = ctypes.create_string_buffer(96)
        if not self._ask("nvmlDeviceGetName", text, ctypes.c_uint(len(text))):
            return None
        return text.value.decode(errors="replace")

    def sm_mhz(self) -> int | None:
        """Clock of the multiprocessors, in 10^6 Hz."""
        return self._uint("nvmlDeviceGetClockInfo", ctypes.c_int(_SM_CLOCK))

    def memory_mhz(self) -> int | None:
        """Clock of the GPU's memory, in 10^6 Hz."""
        return self._uint("nvmlDeviceGetClockInfo", ctypes.c_int(_MEMORY_CLOCK))

    def temperature_c(self) -> int | None:
        """Of the GPU's die, in degrees Celsius."""
        return self._uint("nvmlDeviceGetTemperature", ctypes.c_int(_GPU_TEMPERATURE))

    def power_w(self) -> float | None:
        """Of the whole board in watts: from Ampere on (but GA100) the mean of the last second."""
        milliwatts = self._uint("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def energy_mj(self) -> int | None:
        """Of the board since the driver was loaded, in millijoules; from Volta on."""
        return self._ulong("nvmlDeviceGetTotalEnergyConsumption")

    def clock_reasons(self) -> tuple[str, ...] | None:
        """Why the clocks are not higher, such as "idle" or "power cap"; empty if nothing is."""
        bits = self._ulong("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # its name before driver 535
            bits = self._ulong("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            return None
        return tuple(name for bit, name in _REASONS.items() if bits & bit)

    def slowed_by_heat_ms(self) -> float | None:
        """For how long heat has held the clocks down since the driver was loaded."""
        found = _Violation()
        policy = ctypes.c_int(_THERMAL_POLICY)
        if not self._ask("nvmlDeviceGetViolationStatus", policy, ctypes.byref(found)):
            return None
        return None if found.violation_ns == _NO_VALUE else found.violation_ns / 1e6

    def _uint(self, name: str, *arguments: Any) -> int | None:
        value = ctypes.c_uint()
        return value.value if self._ask(name, *arguments, ctypes.byref(value)) else None

    def _ulong(self, name: str, *arguments: Any) -> int | None:
        value = ctypes.c_ulonglong()
        return value.value if self._ask(name, *arguments, ctypes.byref(value)) else None

    def _ask(self, name: str, *arguments: Any) -> bool:
        return _call(self._library, name, self._handle, *arguments) == _SUCCESS


@functools.cache
def this_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> NvmlGpu | None:
    """The GPU that this process may use first; None without an NVIDIA driver."""
    with contextlib.suppress(OSError):
        return NvmlGpu.open(load(_LIBRARY), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return None


def _call(library: Any, name: str, *arguments: Any) -> int | None:
    """Its return code; None where this version of the library lacks the function."""
    try:
        function = getattr(library, name)
    except AttributeError:
        return None
    code: int = function(*arguments)
    return code
