"""Cut sets as a user makes them, from the tiny bundle."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeclip.export.cli import cut
from edgeclip.export.cuts import write_cuts as module
from edgeclip.export.cuts.cut_tower import cut_tail
from edgeclip.export.cuts.write_cuts import write_cuts
from edgeclip.export.errors import ExportError
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.errors import BundleError, EdgeClipError, InputError
from edgeclip.runtime.planning.cut_set import CUTS_NAME, CutHead, CutSet
from edgeclip.runtime.serving.bundle_models import CutTail


def run(*words: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="edgeclip cut")
    cut.add_arguments(parser)
    return cut.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_cut_set_of_both_forms_of_input(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path, precision: Any
) -> None:
    bundle = Bundle.open(tiny_bundle)
    written = write_cuts(bundle, tmp_path / "cuts", device=cpu_device, precision=precision, count=2)
    cuts = written.cuts
    assert written.difference < 1e-6
    assert cuts.manifest.space == bundle.manifest.space
    assert cuts.manifest.precision == precision
    # The mean colour, three numbers, is what crosses after nothing was computed.
    assert [point.shape for point in cuts.manifest.points] == [(8, 8, 3), (3,)]
    pixels = bundle.golden().pixels
    head, cut_tail = CutHead(cuts, 1, cpu_device), CutTail(cuts, 1, cpu_device)
    expected = bundle.golden().expected[0].embeddings
    np.testing.assert_allclose(cut_tail.embed(head.run(pixels)), expected, atol=0.02)


def test_verb_writes_and_lists(
    tiny_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cuts"
    words = (tiny_bundle, "--out", out, "--pictures", photos, "--count", "2", "--points", "1")
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert "pixels" in printed
    assert f"cut set written to {out}" in printed
    cuts = CutSet.open(out)
    assert cuts.numbers == (0, 1)
    assert [path.suffix for path in cuts.pictures] == [".png", ".png"]
    with pytest.raises(InputError, match="exists"):
        run(*words)
    assert run(*words, "--replace") == 0


def test_a_broken_picture_is_in_no_cut_set(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "blue.png").write_bytes(b"<html>404</html>")
    words = (tiny_bundle, "--out", tmp_path / "cuts", "--pictures", photos, "--points", "1")
    assert run(*words) == 0
    assert len(CutSet.open(tmp_path / "cuts").pictures) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--points", "7"), "there is no cut 7: this tower has the cuts 0 to 1"),
        (("--points", "one"), "give all, or numbers such as 1,3"),
        (("--tower", "text"), "send the text"),
        (("--precision", "fp16"), "no fp16 image tower"),
        (("--pictures", "none"), "none does not exist"),
        (("--device", "no-such-device"), "no device"),
    ],
)
def test_mistakes_leave_nothing_behind(
    tiny_bundle: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "cuts"
    with pytest.raises(EdgeClipError, match=message):
        run(tiny_bundle, "--out", out, "--count", "1", *more)
    assert list(tmp_path.iterdir()) == []


def test_altered_bundle_is_refused(
    own_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    bundle = Bundle.open(own_bundle)
    path = bundle.tower_path("image")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match="was altered"):
        write_cuts(bundle, tmp_path / "cuts", device=cpu_device)


def test_halves_that_differ_are_not_written(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto, cut: Any) -> onnx.ModelProto:
        part = cut_tail(model, cut)
        for node in part.graph.node:
            if node.op_type == "Gemm":
                node.attribute.append(onnx.helper.make_attribute("transB", 1))
                node.input[1] = "turned"
        turned = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
        part.graph.initializer.append(onnx.numpy_helper.from_array(turned, "turned"))
        return part

    monkeypatch.setattr(module, "cut_tail", wrong)
    out = tmp_path / "cuts"
    with pytest.raises(ExportError, match=r"changes an embedding by .*: leave it out"):
        write_cuts(Bundle.open(tiny_bundle), out, device=cpu_device, precision="fp32", count=1)
    assert list(tmp_path.iterdir()) == []


def test_only_a_cut_set_is_replaced(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("words")
    with pytest.raises(InputError, match=f"holds no {CUTS_NAME}"):
        write_cuts(Bundle.open(tiny_bundle), out, device=cpu_device, count=1, replace=True)
    assert (out / "thesis.txt").read_text() == "words"
