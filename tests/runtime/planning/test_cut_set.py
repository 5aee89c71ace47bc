import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import EngineError, InputError, SpaceMismatchError
from edgeclip.runtime.planning.cut_set import CUTS_NAME, CutHead, CutSet, CutSetError
from edgeclip.runtime.serving.bundle_models import CutTail, tail_models
from edgeclip.runtime.serving.models import Registry
from edgeclip.runtime.wire.codec import FLOAT_CODECS, PIXEL_CODECS, CodecName, encode
from edgeclip.runtime.wire.messages import CODEC, CUT, SPACE_ID
from tests.cut_sets import write_cut_set
from tests.runtime.conftest import EMOJI_BUNDLE

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def own_cuts(emoji_cuts: CutSet, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return shutil.copytree(emoji_cuts.path, tmp_path / "cuts")


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((root / CUTS_NAME).read_text())
    change(data)
    (root / CUTS_NAME).write_text(json.dumps(data))


def test_numbers_and_points(emoji_cuts: CutSet) -> None:
    assert emoji_cuts.numbers == tuple(range(10))
    assert emoji_cuts.point(0).shape == (64, 64, 3)
    assert emoji_cuts.point(3).name == "after block 0"
    assert len(emoji_cuts.pictures) == 5
    with pytest.raises(CutSetError, match="no cut 10; it has 0, 1"):
        emoji_cuts.point(10)


@pytest.mark.parametrize("name", ["weights.onnx_data", "head_3.onnx", "pictures/0001.jpg"])
def test_altered_files_are_refused(own_cuts: Path, name: str) -> None:
    content = bytearray((own_cuts / name).read_bytes())
    content[len(content) // 2] ^= 1
    (own_cuts / name).write_bytes(content)
    with pytest.raises(CutSetError, match=f"{name} was altered"):
        CutSet.open(own_cuts)


def test_file_altered_after_opening_is_not_loaded(
    own_cuts: Path, cpu_device: DeviceProfile
) -> None:
    cuts = CutSet.open(own_cuts)
    (own_cuts / "head_3.onnx").write_bytes(b"another graph")
    with pytest.raises(CutSetError, match="was altered"):
        CutHead(cuts, 3, cpu_device)


def test_missing_undeclared_and_linked_files_are_refused(own_cuts: Path) -> None:
    (own_cuts / "more.onnx_data").write_bytes(b"")
    with pytest.raises(CutSetError, match="not declared"):
        CutSet.open(own_cuts)
    (own_cuts / "more.onnx_data").unlink()
    (own_cuts / "tail_2.onnx").rename(own_cuts.parent / "tail_2.onnx")
    with pytest.raises(CutSetError, match=r"tail_2\.onnx is missing"):
        CutSet.open(own_cuts)
    (own_cuts / "tail_2.onnx").symlink_to(own_cuts.parent / "tail_2.onnx")
    with pytest.raises(CutSetError, match="symbolic link"):
        CutSet.open(own_cuts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=2), "schema version 2"),
        (lambda data: data.update(schema_version=True), "schema version True"),
        (lambda data: data.update(space="5"), "64 lower-case"),
        (lambda data: data["files"][0].update(path="../cuts.json"), "unsafe path"),
        (lambda data: data["files"][0].update(path="/etc/passwd"), "unsafe path"),
        (lambda data: data["points"].pop(0), "begin with number 0"),
        (lambda data: data["points"][1].update(axis=9), "do not fit"),
        (lambda data: data.update(more=1), "unknown key"),
        (lambda data: data["points"].append(dict(data["points"][1], number=77)), "head_77"),
    ],
)
def test_manifests_that_are_none_are_refused(
    own_cuts: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(own_cuts, change)
    with pytest.raises(CutSetError, match=message) as caught:
        CutSet.open(own_cuts)
    assert "\n" not in str(caught.value)


def test_what_is_no_cut_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CutSetError, match="not a directory"):
        CutSet.open(tmp_path / "none")
    with pytest.raises(CutSetError, match=r"holds no cuts\.json"):
        CutSet.open(tmp_path)
    (tmp_path / CUTS_NAME).write_text("{" * 100_000)
    with pytest.raises(CutSetError, match="cannot read"):
        CutSet.open(tmp_path)


@pytest.mark.parametrize("number", range(10))
def test_halves_embed_as_the_encoder_does(
    emoji_cuts: CutSet, cpu_device: DeviceProfile, number: int
) -> None:
    encoder = Encoder(Bundle.open(EMOJI_BUNDLE, check_hashes=False), cpu_device)
    head, tail = CutHead(emoji_cuts, number, cpu_device), CutTail(emoji_cuts, number, cpu_device)
    values = head.run(PIXELS)
    assert values.shape == (3, *head.point.shape)
    np.testing.assert_allclose(tail.embed(values), encoder.encode_pixels(PIXELS), atol=1e-4)


@pytest.mark.parametrize(
    ("number", "codec"), [*((0, c) for c in PIXEL_CODECS), *((4, c) for c in FLOAT_CODECS)]
)
def test_tail_answers_what_a_device_sends(
    emoji_cuts: CutSet, cpu_device: DeviceProfile, number: int, codec: CodecName
) -> None:
    head, tail = CutHead(emoji_cuts, number, cpu_device), CutTail(emoji_cuts, number, cpu_device)
    values = head.run(PIXELS)
    sent = encode(codec, values, axis=head.point.axis)
    parameters = {CODEC: codec, CUT: str(number), SPACE_ID: emoji_cuts.manifest.space}
    found = tail.run(sent, parameters)["image_embeds"]
    cosines = (found * tail.embed(values)).sum(axis=1)
    assert found.dtype == np.float32
    assert cosines.min() > 0.999


def test_tail_refuses_what_is_not_for_it(emoji_cuts: CutSet, cpu_device: DeviceProfile) -> None:
    tail = CutTail(emoji_cuts, 3, cpu_device)
    sent = {"cut": np.zeros((1, 65, 128), np.float32)}
    with pytest.raises(SpaceMismatchError):
        tail.run(sent, {SPACE_ID: "0" * 64})
    with pytest.raises(InputError, match="continues from cut 3, not '4'"):
        tail.run(sent, {CUT: "4"})
    with pytest.raises(InputError, match="no codec"):
        tail.run(sent, {CODEC: "int4"})
    with pytest.raises(InputError, match="takes the codecs fp32"):
        tail.run(sent, {CODEC: "uint8"})
    with pytest.raises(InputError, match="cut must be float32"):
        tail.run({"cut": np.zeros((1, 65, 127), np.float32)}, {})


def test_values_without_an_embedding_are_the_senders_fault(
    emoji_cuts: CutSet, cpu_device: DeviceProfile
) -> None:
    tail = CutTail(emoji_cuts, 3, cpu_device)
    huge = np.random.default_rng(0).choice([-3e38, 3e38], (1, 65, 128)).astype(np.float32)
    with pytest.raises(InputError, match="not those of a picture"):
        tail.run({"cut": huge}, {})


def test_int8_for_vnni_is_refused_without(tmp_path: Path, cpu_device: DeviceProfile) -> None:
    with_vnni = dataclasses.replace(cpu_device, name="newer", vnni=True)
    bundle = Bundle.open(EMOJI_BUNDLE, check_hashes=False)
    cuts = write_cut_set(bundle, tmp_path / "cuts", device=with_vnni, points=(3,))
    assert cuts.manifest.precision == "int8"
    assert cuts.numbers == (0, 3)
    with pytest.raises(InputError, match="computes wrongly: cut the bundle again"):
        CutHead(cuts, 3, cpu_device)


def test_head_refuses_other_pixels(emoji_cuts: CutSet, cpu_device: DeviceProfile) -> None:
    for number in (0, 2):
        head = CutHead(emoji_cuts, number, cpu_device)
        wrong: tuple[Any, ...] = (PIXELS[:, :32], PIXELS.astype(np.float32), PIXELS[0], PIXELS[:0])
        for pixels in wrong:
            with pytest.raises(InputError, match="pixels"):
                head.run(pixels)


def test_all_tails_can_be_served(emoji_cuts: CutSet, cpu_device: DeviceProfile) -> None:
    registry = Registry()
    for tail in tail_models(emoji_cuts, cpu_device, "mine"):
        registry.add(tail)
    assert registry.names == tuple(f"mine-tail-{number}" for number in range(10))


def test_tensorrt_device_is_told_what_to_do(emoji_cuts: CutSet) -> None:
    device = dataclasses.replace(load_device("jetson-orin-nano"), precisions=("fp32",))
    with pytest.raises(EngineError, match="runs TensorRT engines"):
        CutHead(emoji_cuts, 1, device)
