import pytest
import torch

from edgeclip.compress.compute import ComputeType, autocast, best_device
from edgeclip.runtime.device.machine import detect_machine


def _product(compute: ComputeType) -> torch.dtype:
    with autocast(compute, torch.device("cpu")):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_formats_that_were_asked_for() -> None:
    assert _product("fp32") == torch.float32
    assert _product("bf16") == torch.bfloat16


def test_auto_takes_bfloat16_where_the_processor_has_it() -> None:
    has = {"avx512_bf16", "amx_bf16"} & set(detect_machine().flags)
    assert _product("auto") == (torch.bfloat16 if has else torch.float32)


def test_best_device() -> None:
    assert best_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
def test_auto_takes_bfloat16_on_a_gpu() -> None:
    with autocast("auto", torch.device("cuda")):
        ones = torch.ones(2, 2, device="cuda")
        assert (ones @ ones).dtype == torch.bfloat16
