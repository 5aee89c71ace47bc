"""In which number format, and where, the training computes."""

import functools
from typing import Literal

import torch

from edgeclip.runtime.device.machine import detect_machine

ComputeType = Literal["auto", "fp32", "bf16"]


def best_device() -> torch.device:
    """A CUDA GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(compute: ComputeType, device: torch.device) -> torch.autocast:
    """Mixed precision: bfloat16 products, float32 weights, norms and softmax.

    `auto` takes bfloat16 where the hardware has it: there it trains three to four times faster
    than float32, on a processor without it many times slower.
    """
    enabled = compute == "bf16" or (compute == "auto" and _has_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def full_precision(device: torch.device) -> torch.autocast:
    """Switch `autocast` off: logits of up to 100 have steps of 0.5 in bfloat16."""
    return torch.autocast(device.type, enabled=False)


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    return bool({"avx512_bf16", "amx_bf16"} & set(detect_machine().flags))
