import copy

import pytest
import torch

from edgeclip.compress.compute import ComputeType, autocast, best_device, fused_attention
from edgeclip.compress.teachers.dual_encoder import DualEncoder
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


@pytest.mark.gpu
def test_attention_is_fused_on_a_gpu_and_gives_the_same(teacher: DualEncoder) -> None:
    model = copy.deepcopy(teacher).to("cuda")
    ids = model.tokenize(["a red apple", "tree"])
    with torch.inference_mode():
        plain = model.embed_text(ids)
        with fused_attention(model.model, model.device):
            assert model.model.config._attn_implementation == "sdpa"
            fused = model.embed_text(ids)
    assert model.model.config._attn_implementation == "eager"
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)


def test_attention_stays_written_out_on_a_cpu(teacher: DualEncoder) -> None:
    with fused_attention(teacher.model, teacher.device):
        assert teacher.model.config._attn_implementation == "eager"
