import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.graph.calibration import calibration_images, calibration_texts
from edgeclip.export.quantizing.qat_finetune import smooth_student
from edgeclip.runtime.spec import Tower

Make = Callable[..., Source]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_smoothed_student_computes_what_it_did(
    tower: Tower, clip: DualEncoder, blobs: Make
) -> None:
    student = copy.deepcopy(clip)
    part = "vision" if tower == "image" else "text"
    layer = f"model.{part}_model.encoder.layers.1"
    norms = [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    with torch.no_grad():  # outliers, which alpha = 1 takes out altogether
        for name in norms:
            student.get_submodule(name).get_parameter("weight")[3] *= 50
    data = (
        calibration_images(blobs(20), clip.spec.image)
        if tower == "image"
        else calibration_texts(blobs(20), clip.text_tokenizer)
    )
    embed = getattr(student, f"embed_{tower}")
    values = torch.from_numpy(data.batch(0))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.inference_mode():
        wanted = embed(values)
        smooth_student(student, tower, dict.fromkeys(norms, 1.0), data)
        torch.testing.assert_close(embed(values), wanted, atol=1e-5, rtol=1e-4)
    after = student.state_dict()
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    assert changed == {
        *(f"{name}.{item}" for name in norms for item in ("weight", "bias")),
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"),
        f"{layer}.mlp.fc1.weight",
    }
    seen: list[torch.Tensor] = []
    norm = student.get_submodule(norms[0])
    assert isinstance(norm, nn.LayerNorm)
    handle = norm.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.inference_mode():
        for index in range(data.count):
            embed(torch.from_numpy(data.batch(index)))
    handle.remove()
    largest = torch.stack([item.abs().flatten(0, -2).amax(dim=0) for item in seen]).amax(dim=0)
    torch.testing.assert_close(largest, torch.ones_like(largest), atol=1e-4, rtol=0)


def test_a_norm_that_no_linear_layer_reads_is_refused(clip: DualEncoder, blobs: Make) -> None:
    data = calibration_images(blobs(4), clip.spec.image)
    student = copy.deepcopy(clip)
    with pytest.raises(ExportError, match=r"no linear layer reads model.*pre_layrnorm"):
        smooth_student(student, "image", {"model.vision_model.pre_layrnorm": 0.5}, data)
