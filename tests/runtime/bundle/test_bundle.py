import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.bundle.manifest import SCHEMA_VERSION
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, SpaceMismatchError

Edit = Callable[[dict[str, Any]], None]
EditManifest = Callable[[Path, Edit], None]
TOWER = "onnx/vision_model.onnx"


def test_whole_bundle_opens(tiny_bundle: Path) -> None:
    bundle = Bundle.open(str(tiny_bundle))
    assert bundle.path == tiny_bundle.resolve()
    assert bundle.tower_path("image").name == "vision_device_int8.onnx"
    assert bundle.tower_path("image", "fp32").name == "vision_model.onnx"
    assert bundle.tokenizer_path.is_file()
    assert bundle.label_names == ()
    assert len(bundle.golden().expected) == 4


def test_link_to_a_bundle_is_followed_once(tiny_bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(tiny_bundle, target_is_directory=True)
    assert Bundle.open(link).path == tiny_bundle.resolve()


@pytest.mark.parametrize("name", ["absent", "file"])
def test_not_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a directory"):
        Bundle.open(tmp_path / name)


def test_directory_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it is no bundle, or copied in part"):
        Bundle.open(tmp_path)


def test_manifest_that_is_not_text(own_bundle: Path) -> None:
    (own_bundle / "edgeclip.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(own_bundle)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_manifest(own_bundle: Path, share: float) -> None:
    path = own_bundle / "edgeclip.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BundleError, match="not complete JSON"):
        Bundle.open(own_bundle)


def test_newer_schema(own_bundle: Path, edit_manifest: EditManifest) -> None:
    edit_manifest(own_bundle, lambda data: data.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(BundleError, match=f"reads version {SCHEMA_VERSION}: update edgeclip"):
        Bundle.open(own_bundle)


def every_file(bundle: Path) -> list[str]:
    return [file.path for file in Bundle.open(bundle).manifest.files]


def test_any_missing_file_is_refused(own_bundle: Path) -> None:
    for name in every_file(own_bundle):
        aside = own_bundle.parent / "aside"
        shutil.move(own_bundle / name, aside)
        with pytest.raises(BundleError, match=f"{name} is missing"):
            Bundle.open(own_bundle)
        shutil.move(aside, own_bundle / name)
    Bundle.open(own_bundle)


def test_any_truncated_file_is_refused_by_its_size(own_bundle: Path) -> None:
    for name in every_file(own_bundle):
        content = (own_bundle / name).read_bytes()
        (own_bundle / name).write_bytes(content[:-1])
        with pytest.raises(BundleError, match=f"{name} has {len(content) - 1} bytes instead of"):
            Bundle.open(own_bundle, check_hashes=False)
        (own_bundle / name).write_bytes(content)


def test_any_altered_bit_is_refused_by_its_hash(own_bundle: Path) -> None:
    for name in every_file(own_bundle):
        content = bytearray((own_bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (own_bundle / name).write_bytes(content)
        with pytest.raises(BundleError, match=f"{name} was altered"):
            Bundle.open(own_bundle)
        content[len(content) // 2] ^= 1
        (own_bundle / name).write_bytes(content)


def test_directory_in_the_place_of_a_file(own_bundle: Path) -> None:
    (own_bundle / "config.json").unlink()
    (own_bundle / "config.json").mkdir()
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        Bundle.open(own_bundle)


@pytest.mark.parametrize("name", [TOWER, "onnx", "edgeclip.json", "README.md"])
def test_symbolic_links_are_refused(own_bundle: Path, tmp_path: Path, name: str) -> None:
    path = own_bundle / name
    if not path.exists():
        path.write_text("undeclared")
    aside = tmp_path / "aside"
    shutil.move(path, aside)
    path.symlink_to(aside)
    with pytest.raises(BundleError, match="is a symbolic link"):
        Bundle.open(own_bundle)


def as_in_a_hub_cache(bundle: Path, cache: Path) -> Path:
    """Lay a bundle out as huggingface_hub keeps it; return the folder of its snapshot."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "1234", cache / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(bundle.rglob("*"))):
        place = snapshot / path.relative_to(bundle)
        if path.is_dir():
            place.mkdir(parents=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / f"{number:040x}")
        up = "../" * (len(path.relative_to(bundle).parts) + 1)
        place.symlink_to(f"{up}blobs/{number:040x}")
    return snapshot


def test_a_snapshot_in_a_hub_cache_is_opened_and_run(tiny_bundle: Path, tmp_path: Path) -> None:
    snapshot = as_in_a_hub_cache(tiny_bundle, tmp_path)
    assert (snapshot / "edgeclip.json").is_symlink()
    found, plain = (
        Encoder.open(path).encode_text(["a red apple"]) for path in (snapshot, tiny_bundle)
    )
    np.testing.assert_array_equal(found, plain)
    blob = (snapshot / TOWER).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(snapshot)


def test_a_snapshot_with_links_to_elsewhere_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    snapshot = as_in_a_hub_cache(tiny_bundle, tmp_path)
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(snapshot / TOWER, other / "1")
    (snapshot / TOWER).unlink()
    (snapshot / TOWER).symlink_to(other / "1")
    with pytest.raises(BundleError, match="is a symbolic link"):
        Bundle.open(snapshot)


@pytest.mark.parametrize("name", ["onnx/.DS_Store", "labels/Thumbs.db", "onnx/._vision_model.onnx"])
def test_what_a_file_manager_left_is_let_be(own_bundle: Path, name: str) -> None:
    (own_bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (own_bundle / name).write_text("")
    Bundle.open(own_bundle)


@pytest.mark.parametrize("name", ["onnx/weights.bin", "labels/other.npz", "engines/deep/a.engine"])
def test_undeclared_file_where_the_runtime_loads_from(own_bundle: Path, name: str) -> None:
    (own_bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (own_bundle / name).write_text("")
    with pytest.raises(BundleError, match=f"{name} is not declared"):
        Bundle.open(own_bundle)


def test_undeclared_file_elsewhere_is_let_be(own_bundle: Path) -> None:
    (own_bundle / "README.md").write_text("a model card")
    (own_bundle / ".gitattributes").write_text("")
    Bundle.open(own_bundle)


def test_failed_gate_is_refused(own_bundle: Path, edit_manifest: EditManifest) -> None:
    def fail(data: dict[str, Any]) -> None:
        data["towers"][1]["files"][1]["gates"][0].update(
            outcome="failed", value=0.5, low=0.4, high=0.6
        )

    edit_manifest(own_bundle, fail)
    with pytest.raises(BundleError, match=r"gates as failed \(text int8: mean cosine\)"):
        Bundle.open(own_bundle)


def test_path_trick_loads_nothing(
    own_bundle: Path, edit_manifest: EditManifest, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("")
    edit_manifest(own_bundle, lambda data: data["files"][0].update(path="../secret"))
    with pytest.raises(BundleError, match=r"unsafe path '\.\./secret'"):
        Bundle.open(own_bundle)


def test_labels_by_name(
    own_bundle: Path, edit_manifest: EditManifest, reseal: Callable[[Path], None]
) -> None:
    space = Bundle.open(own_bundle).manifest.space
    rows = np.eye(2, 8, dtype=np.float32)
    labels = LabelSet(names=("a", "b"), embeddings=rows, space=space, templates=("{}",))
    labels.save(own_bundle / "labels" / "two.npz")
    entry = {"path": "labels/two.npz", "bytes": 0, "sha256": "0" * 64}
    edit_manifest(own_bundle, lambda data: data["files"].append(entry))
    reseal(own_bundle)
    bundle = Bundle.open(own_bundle)
    assert bundle.label_names == ("two",)
    assert bundle.labels("two").names == ("a", "b")
    with pytest.raises(BundleError, match="no label set 'three'; it has two"):
        bundle.labels("three")
    edit_manifest(own_bundle, lambda data: data.update(space="6" * 64))
    with pytest.raises(SpaceMismatchError):
        Bundle.open(own_bundle).labels("two")
