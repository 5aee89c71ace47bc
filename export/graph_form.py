"""What shape a captured graph has: operator set, inputs, batch, outputs."""

from dataclasses import dataclass

from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.spec import PixelForm

# LayerNormalization is one operator since 17, and 18 is what most runtimes read.
PLAIN_OPSET = 18
# Since 19, scales of quantization may be fp16 and quantized values float8. TensorRT 10.0
# reads up to 20.
TENSORRT_OPSET = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphForm:
    """How a tower is captured.

    Attributes:
        opset: version of the ONNX operator set.
        pixels: what an image tower takes.
        batch: the only batch size that the graph takes; None where it may vary.
        patch_features: an image tower also gives the last hidden state of each patch.
    """

    opset: int = PLAIN_OPSET
    pixels: PixelForm = "float32-nchw"
    batch: int | None = None
    patch_features: bool = False

    @classmethod
    def for_device(cls, device: DeviceProfile, *, patch_features: bool = False) -> "GraphForm":
        """Return what suits a device."""
        return cls(
            opset=TENSORRT_OPSET if "tensorrt" in device.engine else PLAIN_OPSET,
            pixels=device.pixels,
            batch=device.static_batch,
            patch_features=patch_features,
        )
