"""NVIDIA's management library in miniature, with its C calling conventions.

Its functions are real function pointers: nvidia-ml-py calls them through ctypes, as it would
those of the driver's library. Numbers and structures are those of `nvml.h`.
"""

import ctypes
import struct
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_char_p, c_int, c_uint, c_void_p
from typing import Any

import pynvml
import pytest

from edgeclip.profiles.sensors.nvml import NvmlGpu

NOT_SUPPORTED = 3
HANDLE = 0xABC0
UUID = b"GPU-5f1c"
BUSY = {
    "sm": 1410,
    "memory": 1593,
    "temperature": 71,
    "milliwatts": 251_400,
    "millijoules": 2**40 + 5,
    "reasons": 0x44,
    "violation_ns": 2_500_000_000,
}


class FakeNvml:
    """A GPU that reports `values`; a function without a value is not supported.

    Args:
        values: "sm", "memory", "temperature", "milliwatts", "millijoules", "reasons",
            "violation_ns". A callable is called each time.
        lacks: functions that this version of the library does not have.
    """

    def __init__(self, values: dict[str, Any], lacks: frozenset[str] = frozenset()) -> None:
        self._values = values
        self.opened: list[int | bytes] = []
        for name, function in self._functions().items():
            if name not in lacks:
                setattr(self, name, function)

    def _functions(self) -> dict[str, Any]:
        one_value = CFUNCTYPE(c_int, c_void_p, c_void_p)
        of_a_kind = CFUNCTYPE(c_int, c_void_p, c_uint, c_void_p)
        reasons = one_value(lambda handle, out: self._write("Q", "reasons", out))
        return {
            "nvmlInitWithFlags": CFUNCTYPE(c_int, c_uint)(lambda flags: 0),
            "nvmlDeviceGetHandleByIndex_v2": CFUNCTYPE(c_int, c_uint, c_void_p)(self._open),
            "nvmlDeviceGetHandleByUUID": CFUNCTYPE(c_int, c_char_p, c_void_p)(self._open),
            "nvmlDeviceGetName": CFUNCTYPE(c_int, c_void_p, c_void_p, c_uint)(self._name),
            "nvmlDeviceGetClockInfo": of_a_kind(
                lambda handle, kind, out: self._write("I", {1: "sm", 2: "memory"}[kind], out)
            ),
            "nvmlDeviceGetTemperature": of_a_kind(
                lambda handle, sensor, out: self._write("I", "temperature", out)
            ),
            "nvmlDeviceGetPowerUsage": one_value(
                lambda handle, out: self._write("I", "milliwatts", out)
            ),
            "nvmlDeviceGetTotalEnergyConsumption": one_value(
                lambda handle, out: self._write("Q", "millijoules", out)
            ),
            "nvmlDeviceGetCurrentClocksEventReasons": reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": reasons,
            "nvmlDeviceGetViolationStatus": of_a_kind(self._violation),
        }

    def _open(self, which: int | bytes, out: int) -> int:
        if which not in (0, 1, UUID):
            return 2  # NVML_ERROR_INVALID_ARGUMENT
        self.opened.append(which)
        ctypes.memmove(out, struct.pack("P", HANDLE), struct.calcsize("P"))
        return 0

    def _name(self, handle: int, out: int, size: int) -> int:
        assert handle == HANDLE
        ctypes.memmove(out, b"NVIDIA Test 1\0", 14)
        return 0

    def _write(self, form: str, key: str, out: int) -> int:
        value = self._values.get(key)
        if value is None:
            return NOT_SUPPORTED
        number = value() if callable(value) else value
        ctypes.memmove(out, struct.pack(form, number), struct.calcsize(form))
        return 0

    def _violation(self, handle: int, policy: int, out: int) -> int:
        if "violation_ns" not in self._values or policy != 1:
            return NOT_SUPPORTED
        ctypes.memmove(out, struct.pack("=QQ", 17, self._values["violation_ns"]), 16)
        return 0


def load_into_pynvml(monkeypatch: pytest.MonkeyPatch, library: FakeNvml | None) -> None:
    """Let nvidia-ml-py find `library` in place of the driver's; None for a machine without."""

    def load(name: str) -> FakeNvml:
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(pynvml, "CDLL", load)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})


MakeGpu = Callable[..., NvmlGpu]
