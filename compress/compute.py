"""Choose the torch device of training, its mixed precision and its attention."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from transformers import PreTrainedModel

from edgeclip.runtime.device.machine import detect_machine

ComputeType = Literal["auto", "fp32", "bf16"]


def best_device() -> torch.device:
    """Return the CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(compute: ComputeType, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context: bfloat16 products, float32 weights, norms and softmax.

    `auto` uses bfloat16 if the hardware has it: there it trains three to four times faster than
    float32, and on a processor without it many times slower.
    """
    enabled = compute_dtype(compute, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compute_dtype(compute: ComputeType, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products, see `autocast`."""
    is_short = compute == "bf16" or (compute == "auto" and _has_bfloat16(device))
    return torch.bfloat16 if is_short else torch.float32


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & set(detect_machine().flags))


@contextmanager
def fused_attention(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Run the block with torch's fused attention on a GPU: faster there, and with less memory.

    On a CPU attention stays written out, see `DualEncoder`, and so do towers without attention.
    """
    before = model.config._attn_implementation
    try:
        if device.type == "cuda":
            with suppress(ValueError):  # of towers that transformers has not written so
                model.set_attn_implementation("sdpa")
        yield
    finally:
        model.set_attn_implementation(before)
