"""A bundle without a text tower: what works on it, and what says why it does not."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeclip.profiles.measure.open_subject import open_subject
from edgeclip.profiles.measure.subject import bundle_parts, bundle_subjects
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.cli.verify import replay_golden
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, InputError
from edgeclip.runtime.serving.bundle_models import bundle_models

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def encoder(image_bundle: Path, cpu_device: DeviceProfile) -> Encoder:
    return Encoder.open(image_bundle, device=cpu_device)


def test_pictures_and_labels_work(encoder: Encoder, photos: Path) -> None:
    images = [photos / f"{name}.png" for name in ("blue", "red")]
    answers = encoder.classify(images, encoder.bundle.labels("colours"), top=1)
    assert [best.label for (best,) in answers] == ["blue", "red"]
    index = Index(("blue", "red"), encoder.encode_image(images), encoder.space)
    assert encoder.search(images[1], index, top=1)[0][0].key == "red"
    assert encoder.precisions == {"image": "int8"}


@pytest.mark.parametrize(
    "use",
    [
        lambda encoder: encoder.encode_text("red"),
        lambda encoder: encoder.encode_text([]),
        lambda encoder: encoder.bake_labels(["red"]),
        lambda encoder: encoder.embed_query("red"),
    ],
)
def test_texts_are_refused_with_what_helps(
    encoder: Encoder, use: Callable[[Encoder], object]
) -> None:
    message = r"has no text tower, so it cannot embed texts: classify by its label sets \(colours\)"
    with pytest.raises(InputError, match=message):
        use(encoder)


def test_the_golden_pictures_are_replayed(image_bundle: Path, cpu_device: DeviceProfile) -> None:
    replays = replay_golden(Bundle.open(image_bundle), cpu_device)
    assert {(item.tower, item.precision) for item in replays} == {
        *(("image", "fp32"), ("image", "int8"))
    }
    assert all(item.passed for item in replays)


def test_golden_texts_are_needed_only_with_a_text_tower(
    image_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    alone, both = Bundle.open(image_bundle), Bundle.open(tiny_bundle)
    golden = dataclasses.replace(both.golden(), texts=(), input_ids=alone.golden().input_ids)
    golden.save(tmp_path / "golden.npz")
    with pytest.raises(BundleError, match="and at least one"):
        type(golden).load(tmp_path / "golden.npz", both.manifest)


def test_its_parts_are_profiled(image_bundle: Path, cpu_device: DeviceProfile) -> None:
    bundle = Bundle.open(image_bundle)
    assert bundle_parts(bundle) == ("image", "file")
    subjects = bundle_subjects(bundle, cpu_device)
    assert [item.title for item in subjects] == ["image fp32", "image int8", "file int8"]
    for spec in subjects:
        with open_subject(spec, bundle=bundle) as opened:
            found = opened.target.run(opened.target.make_batch(2))
            assert isinstance(found, np.ndarray)
            assert found.shape == (2, 8)
    with pytest.raises(BundleError, match="has no text tower"):
        bundle_subjects(bundle, cpu_device, ("text",))


def test_it_is_served_without_a_text_model(encoder: Encoder) -> None:
    assert [model.name for model in bundle_models(encoder, "b")] == [
        *("b-image", "b-pixels", "b-labels-colours")
    ]


def test_verify_says_what_it_holds(image_bundle: Path, capsys: Capture) -> None:
    assert main(["verify", str(image_bundle)]) == 0
    out = capsys.readouterr().out
    assert out.count(" ok\n") == 2
    assert "text" not in out


def test_classify_takes_the_only_label_set(
    image_bundle: Path, photos: Path, capsys: Capture
) -> None:
    options = ["--bundle", str(image_bundle), "--top", "1", "--json"]
    assert main(["classify", str(photos), *options]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert {Path(path).stem: best[0]["label"] for path, best in images.items()} == {
        name: name for name in ("red", "green", "blue")
    }
    assert main(["classify", str(photos), *options, "--labels", "red,blue"]) == 2
    assert "has no text tower" in capsys.readouterr().err


def test_push_shows_what_would_be_sent(image_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    card = tmp_path / "card.md"
    command = ["push", str(image_bundle), "someone/tiny", "--dry-run", "--card", str(card)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "labels/colours.npz" in out
    assert "tokenizer" not in out
    assert "no text tower" in card.read_text(encoding="utf-8")


def test_a_report_is_written(image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(image_bundle), "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
