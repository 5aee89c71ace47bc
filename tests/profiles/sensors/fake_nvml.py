"""NVIDIA's management library in miniature, with its C calling conventions.

Its functions are real function pointers: what calls them passes through ctypes as it would to the
driver's library. Numbers and structures are those of `nvml.h`.
"""

import ctypes
import struct
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from typing import Any

NOT_SUPPORTED = 3
UINT, ULONG = POINTER(c_uint), POINTER(c_ulonglong)
HANDLE = 0xABC0
UUID = b"GPU-5f1c"


class FakeNvml:
    """A GPU of which `values` says what it tells; a function without a value is not supported.

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
        def clock(handle: int, kind: int, out: Any) -> int:
            return self._tell({1: "sm", 2: "memory"}[kind], out)

        return {
            "nvmlInit_v2": CFUNCTYPE(c_int)(lambda: 0),
            "nvmlDeviceGetHandleByIndex_v2": CFUNCTYPE(c_int, c_uint, POINTER(c_void_p))(
                self._open
            ),
            "nvmlDeviceGetHandleByUUID": CFUNCTYPE(c_int, c_char_p, POINTER(c_void_p))(self._open),
            "nvmlDeviceGetName": CFUNCTYPE(c_int, c_void_p, c_void_p, c_uint)(self._name),
            "nvmlDeviceGetClockInfo": CFUNCTYPE(c_int, c_void_p, c_int, UINT)(clock),
            "nvmlDeviceGetTemperature": CFUNCTYPE(c_int, c_void_p, c_int, UINT)(
                lambda handle, sensor, out: self._tell("temperature", out)
            ),
            "nvmlDeviceGetPowerUsage": CFUNCTYPE(c_int, c_void_p, UINT)(self._teller("milliwatts")),
            "nvmlDeviceGetTotalEnergyConsumption": CFUNCTYPE(c_int, c_void_p, ULONG)(
                self._teller("millijoules")
            ),
            "nvmlDeviceGetCurrentClocksEventReasons": CFUNCTYPE(c_int, c_void_p, ULONG)(
                self._teller("reasons")
            ),
            "nvmlDeviceGetCurrentClocksThrottleReasons": CFUNCTYPE(c_int, c_void_p, ULONG)(
                self._teller("reasons")
            ),
            "nvmlDeviceGetViolationStatus": CFUNCTYPE(c_int, c_void_p, c_int, c_void_p)(
                self._violation
            ),
        }

    def _open(self, which: int | bytes, out: Any) -> int:
        if which not in (0, 1, UUID):
            return 2  # NVML_ERROR_INVALID_ARGUMENT
        self.opened.append(which)
        out[0] = HANDLE
        return 0

    def _name(self, handle: int, out: int, size: int) -> int:
        assert handle == HANDLE
        ctypes.memmove(out, b"NVIDIA Test 1\0", 14)
        return 0

    def _teller(self, key: str) -> Callable[[int, Any], int]:
        return lambda handle, out: self._tell(key, out)

    def _tell(self, key: str, out: Any) -> int:
        value = self._values.get(key)
        if value is None:
            return NOT_SUPPORTED
        out[0] = value() if callable(value) else value
        return 0

    def _violation(self, handle: int, policy: int, out: int) -> int:
        if "violation_ns" not in self._values or policy != 1:
            return NOT_SUPPORTED
        ctypes.memmove(out, struct.pack("=QQ", 17, self._values["violation_ns"]), 16)
        return 0
