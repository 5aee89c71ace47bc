"""A bundle that gives shorter and coarser embeddings: encoder, `embed`, `search`, server."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, sha256_file
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.bundle.manifest import FileRecord, Manifest, ReducedForm
from edgeclip.runtime.bundle.reduced_index import ReducedIndex, load_index
from edgeclip.runtime.bundle.reduction import BASIS_NAME, Basis, Form, make_basis
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, InputError, SpaceMismatchError
from edgeclip.runtime.serving.bundle_models import bundle_models
from edgeclip.runtime.serving.search_model import SearchModel
from tests.conftest import COLOURS, DIM, GATE, SPACE

FORMS = (Form(DIM, "binary"), Form(4, "float32"), Form(4, "int8"), Form(4, "binary"))


def a_basis(space: str = SPACE) -> Basis:
    return make_basis(np.diag(np.arange(DIM, 0, -1.0)), space, (4,))


def give_forms(root: Path, basis: Basis) -> None:
    basis.save(root / BASIS_NAME)
    manifest = Manifest.from_json((root / MANIFEST_NAME).read_text(encoding="utf-8"))
    path = root / BASIS_NAME
    record = FileRecord(BASIS_NAME, path.stat().st_size, sha256_file(path))
    forms = tuple(ReducedForm(form, (GATE,)) for form in FORMS)
    files = (*(own for own in manifest.files if own.path != BASIS_NAME), record)
    changed = dataclasses.replace(manifest, files=files, reduced=forms)
    (root / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")


@pytest.fixture
def reduced_bundle(own_bundle: Path) -> Path:
    give_forms(own_bundle, a_basis())
    return own_bundle


@pytest.fixture
def encoder(reduced_bundle: Path, cpu_device: DeviceProfile) -> Encoder:
    return Encoder.open(reduced_bundle, device=cpu_device)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    folder = Path("pics")
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    return folder


def embed(bundle: Path, *words: str) -> int:
    return main(["embed", "pics", "--bundle", str(bundle), "--out", "index.npz", *words])


def test_the_manifest_keeps_its_forms(reduced_bundle: Path) -> None:
    manifest = Bundle.open(reduced_bundle).manifest
    assert tuple(item.form for item in manifest.reduced) == FORMS
    assert ("4 int8", GATE) in list(manifest.all_gates())
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_without_forms_says_nothing_of_them(tiny_bundle: Path) -> None:
    assert "reduced" not in json.loads(Bundle.open(tiny_bundle).manifest.to_json())


def test_embeddings_are_cut_and_normalised(encoder: Encoder) -> None:
    whole, cut = encoder.encode_text(["a red apple"]), encoder.encode_text(["a red apple"], dim=4)
    assert cut.shape == (1, 4)
    assert np.allclose(cut, whole[:, :4] / np.linalg.norm(whole[:, :4]), atol=1e-6)
    assert encoder.encode_image([], dim=4).shape == (0, 4)
    with pytest.raises(BundleError, match="gives no embeddings of 5 float32; it gives 8 binary, 4"):
        encoder.encode_text("a red apple", dim=5)


def test_a_basis_of_another_space_is_refused(
    reduced_bundle: Path, cpu_device: DeviceProfile
) -> None:
    give_forms(reduced_bundle, a_basis(space="6" * 64))
    with pytest.raises(BundleError, match="another embedding space"):
        Encoder.open(reduced_bundle, device=cpu_device).reducer(4)
    (reduced_bundle / BASIS_NAME).write_bytes(b"x" * (reduced_bundle / BASIS_NAME).stat().st_size)
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(reduced_bundle)


@pytest.mark.parametrize("form", FORMS)
def test_embed_and_search(
    reduced_bundle: Path,
    tiny_bundle: Path,
    pictures: Path,
    form: Form,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--dim", str(form.length), "--embeddings", form.dtype)
    assert embed(reduced_bundle, *words) == 0
    assert f"3 embeddings of length {form.length} as {form.dtype}" in capsys.readouterr().out
    index = load_index(Path("index.npz"))
    assert isinstance(index, ReducedIndex)
    assert index.reducer.form == form
    # The tiny bundle itself has no axes: the index brings them.
    for bundle in (reduced_bundle, tiny_bundle):
        search = ["search", "a red apple", "--index", "index.npz", "--bundle", str(bundle)]
        assert main([*search, "--top", "1"]) == 0
        assert "pics/red.png" in capsys.readouterr().out


def test_a_reduced_index_is_updated(
    reduced_bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dim", "4", "--embeddings", "binary")
    assert embed(reduced_bundle, *words) == 0
    before = Path("index.npz").read_bytes()
    (pictures / "red.png").unlink()
    Image.new("RGB", (8, 8), (200, 200, 20)).save(pictures / "yellow.png")
    assert embed(reduced_bundle, *words) == 0
    assert "1 added, 0 changed, 1 removed, 2 as before" in capsys.readouterr().out
    assert embed(reduced_bundle, "--replace", *words) == 0
    updated = load_index(Path("index.npz"))
    Path("index.npz").write_bytes(before)
    for other in (("--dim", "4"), ()):
        assert embed(reduced_bundle, *other) == 2
        assert "begin anew with --replace" in capsys.readouterr().err
    assert updated.keys == ("pics/blue.png", "pics/green.png", "pics/yellow.png")


def test_axes_of_another_bundle(
    reduced_bundle: Path, tiny_bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(tiny_bundle, "--dim", "4") == 2
    assert "gives no embeddings of 4 float32" in capsys.readouterr().err
    assert embed(tiny_bundle, "--dim", "4", "--basis", str(reduced_bundle)) == 0
    assert embed(reduced_bundle, "--replace", "--dim", "4") == 0


def test_the_server_gives_the_forms(encoder: Encoder) -> None:
    models = {model.name: model for model in bundle_models(encoder, "own")}
    texts = {"texts": np.array([b"a red apple", b"the blue sea"], object)}
    full = encoder.encode_text(["a red apple", "the blue sea"])
    for form in FORMS:
        parameters = {"dim": form.length, "embeddings": form.dtype}
        found = models["own-text"].run(texts, parameters)["text_embeds"]
        wanted = encoder.reducer(form.length, form.dtype).rows(full)
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)
    assert np.array_equal(models["own-text"].run(texts, {"dim": DIM})["text_embeds"], full)
    mistakes: tuple[dict[str, str | int | float | bool], ...] = (
        {"dim": 5},
        {"dim": 2.5},
        {"dim": 0},
        {"dim": 4, "embeddings": "int4"},
    )
    for wrong in mistakes:
        with pytest.raises(InputError):
            models["own-text"].run(texts, wrong)


def test_the_server_searches_reduced_rows(encoder: Encoder, tmp_path: Path) -> None:
    names = [f"a {name} apple" for name in COLOURS]
    full = encoder.encode_text(names)
    reducer = encoder.reducer(4, "binary")
    index = ReducedIndex.of(Index(tuple(names), full, SPACE), reducer)
    model = SearchModel(index, "own", tmp_path)
    wanted = [[hit.key.encode() for hit in hits] for hits in index.search(full, 2)]
    found = model.run({"embeddings": full}, {"top": 2})
    assert found["key"].tolist() == wanted
    parameters: dict[str, str | int | float | bool] = {"top": 2, "basis": reducer.digest}
    cut = model.run({"embeddings": reducer.reduce(full)}, parameters)
    assert cut["key"].tolist() == wanted
    with pytest.raises(SpaceMismatchError):
        model.run({"embeddings": reducer.reduce(full)}, {"basis": "0" * 64})
    whole = encoder.reducer(dtype="binary")  # as long as a full embedding, and turned
    with pytest.raises(InputError):
        SearchModel(Index(tuple(names), full, SPACE), "full", tmp_path).run(
            {"embeddings": whole.reduce(full)}, {"basis": whole.digest}
        )
    with pytest.raises(InputError):
        model.run({"embeddings": reducer.reduce(full)}, {})
