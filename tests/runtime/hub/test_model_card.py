"""The model card: what it says, and that nothing in a manifest can break it."""

import dataclasses
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.manifest import (
    COSINE_TO_TEACHER,
    DataRecord,
    FileRecord,
    GateRemark,
    Manifest,
    Provenance,
)
from edgeclip.runtime.console import plain_text
from edgeclip.runtime.hub.model_card import base_model, render_card

REPO = "someone/tiny"
NASTY = st.one_of(
    st.text(max_size=40),
    st.text("-#`|<>*_[]()\n\r\t\\'\":&;{}%$!? a1", max_size=40),
    st.sampled_from(
        ["---\nlicense: mit", "| a | b |", "```", "# x #", "<script>", "<!--", "\ud800", "\x1b[31m"]
    ),
)


def card_of(bundle: Bundle, **changes: Any) -> str:
    """The card of a bundle whose manifest says something else."""
    changed = dataclasses.replace(bundle.manifest, **changes)
    return render_card(dataclasses.replace(bundle, manifest=changed), REPO, base_model=None)


def front_matter(card: str) -> dict[str, Any]:
    start, fields, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert start == ""
    assert body.startswith("\n\n# ")
    loaded = yaml.safe_load(fields)
    assert isinstance(loaded, dict)
    return loaded


def rows(card: str, title: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    section = card.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [line[2:-2].split(" | ") for line in lines[2:]]


def prose(card: str) -> str:
    """What follows the front matter, without code blocks."""
    body = card.split("\n---\n", 1)[1]
    return re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_front_matter(bundle: Bundle) -> None:
    assert front_matter(render_card(bundle, REPO, base_model="openai/clip")) == {
        "license": "apache-2.0",
        "library_name": "edgeclip",
        "pipeline_tag": "zero-shot-image-classification",
        "base_model": "openai/clip",
        "tags": ["edgeclip", "clip", "onnx", "edge", "feature-extraction"],
    }


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("CC-BY-SA-4.0", {"license": "cc-by-sa-4.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("LGPL-2.1-only", {"license": "lgpl-2.1"}),
        ("ODbL-1.0", {"license": "odbl"}),
        ("unknown", {"license": "unknown"}),
        ("", {"license": "unknown"}),
        ("other", {"license": "other", "license_name": "other"}),
        (
            "Apache-2.0 AND CC-BY-SA-4.0",
            {"license": "other", "license_name": "apache-2.0-and-cc-by-sa-4.0"},
        ),
        ("研究のみ", {"license": "other", "license_name": "see-model-card"}),
    ],
)
def test_licence(bundle: Bundle, licence: str, fields: dict[str, str]) -> None:
    card = card_of(bundle, licence=licence)
    found = front_matter(card)
    assert {key: found[key] for key in found if key.startswith("license")} == fields
    assert f"\n- Weights: {licence or 'unknown'}\n" in card
    assert "no licence of its own for the data; what it says of them is: none" in card


def test_licence_text_is_linked(bundle: Bundle) -> None:
    text = FileRecord("LICENSE", 3, "0" * 64)
    files = (*bundle.manifest.files, text)
    assert front_matter(card_of(bundle, licence="Ours", files=files))["license_link"] == "LICENSE"
    assert "license_link" not in front_matter(card_of(bundle, licence="MIT", files=files))


@given(NASTY, NASTY, NASTY, NASTY)
def test_nothing_breaks_it(
    bundle: Bundle, name: str, licence: str, origin: str, version: str
) -> None:
    provenance = Provenance(
        teacher=origin,
        student=origin,
        data=origin,
        command=origin,
        created=origin,
        versions=((version, version),),
    )
    card = card_of(bundle, name=name, licence=licence, provenance=provenance, measured_on=origin)
    plain = card_of(bundle)
    found = front_matter(card)
    assert found["pipeline_tag"] == "zero-shot-image-classification"
    assert (found["license"] == "other") is isinstance(found.get("license_name"), str)
    assert card.encode().decode() == card
    # The same sections and tables: nothing that was put in is taken for markup.
    headings = re.compile(r"^## .*$", re.MULTILINE)
    assert headings.findall(card) == headings.findall(plain)
    assert rows(card, "Towers") == rows(plain, "Towers")
    body = prose(card)
    assert "<" not in body.replace("<= ", "")
    assert len(body.splitlines()) == len(prose(plain).splitlines())


@given(NASTY)
def test_text_is_readable_after_unescaping(bundle: Bundle, name: str) -> None:
    heading = re.search(r"^# (.*)$", card_of(bundle, name=name), re.MULTILINE)
    assert heading is not None
    expected = plain_text(name)
    if not re.search(r"&#?\w+;?", expected):  # entities of its own are kept as they are written
        assert html.unescape(heading[1]) == (expected or REPO)
    assert not set(re.sub(r"&#\d+;", "", heading[1])) & set("\\`*_[]<|~${}&#")


def test_figures_are_those_of_the_manifest(bundle: Bundle) -> None:
    gates = list(bundle.manifest.all_gates())
    table = rows(render_card(bundle, REPO, base_model=None), "Quality gates")
    assert len(table) == len(gates) > 0
    for row, (what, gate) in zip(table, gates, strict=True):
        assert row[:2] == [what, gate.name]
        assert float(row[2]) == pytest.approx(gate.value, rel=1e-8)
        low, high = map(float, row[3].removesuffix(" (95%)").split(" to "))
        assert (low, high) == pytest.approx((gate.low, gate.high), rel=1e-8)
        assert row[4] == f"{gate.direction} {gate.bound:.9g}"
        assert row[5:] == [gate.unit, "", "passed"]


def test_gates_name_their_data_and_what_is_to_be_known(bundle: Bundle) -> None:
    data = DataRecord("photos, 40 pictures", 40, "ab" * 32)
    gates = (dataclasses.replace(next(iter(bundle.manifest.all_gates()))[1], data=data),)
    remarks = (GateRemark("image int8", "zero-shot top-1 loss", "not judged: no labels"),)
    card = card_of(bundle, gates=gates, remarks=remarks)
    assert rows(card, "Quality gates")[-1][-2:] == ["[1]", "passed"]
    assert f"- [1]: photos, 40 pictures, 40 measured, of SHA-256 `{data.sha256}`" in card
    assert "- image int8: zero-shot top-1 loss: not judged: no labels" in card


def test_a_bundle_without_texts_says_so(image_bundle: Path) -> None:
    card = render_card(Bundle.open(image_bundle), REPO, base_model=None)
    assert front_matter(card)["pipeline_tag"] == "image-feature-extraction"
    assert "no text tower" in card
    assert "encode_text" not in card
    assert "edgeclip classify photo.jpg --bundle tiny --labels colours" in card
    assert {row[0] for row in rows(card, "Towers")} == {"image"}


def with_towers(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    towers = tuple(
        dataclasses.replace(
            tower, files=tuple(dataclasses.replace(file, **changes) for file in tower.files)
        )
        for tower in manifest.towers
    )
    return {"towers": towers}


def test_no_gates(bundle: Bundle) -> None:
    card = card_of(bundle, **with_towers(bundle.manifest, gates=()))
    assert "## Quality gates\n\nNone was measured." in card
    assert "No gate was measured for: image fp32" in card


def test_latency_only_where_it_was_measured(bundle: Bundle) -> None:
    card = card_of(bundle)
    assert {row[6] for row in rows(card, "Towers")} == {"not measured"}
    assert "Median latency" not in card
    assert "Latency was not measured for: image" in card
    card = card_of(bundle, **with_towers(bundle.manifest, latency_ms=1.5), measured_on="Pi_5")
    assert {row[6] for row in rows(card, "Towers")} == {"1.5 ms"}
    assert "Median latency of one call, on: Pi&#95;5." in card
    assert "Latency was not measured for" not in card


def test_vnni_is_a_limit(bundle: Bundle) -> None:
    assert "VNNI" not in card_of(bundle)
    assert "VNNI" in card_of(bundle, **with_towers(bundle.manifest, needs_vnni=True))


def test_what_lies_in_the_bundle(bundle: Bundle) -> None:
    more = [FileRecord(path, 10**6, "0" * 64) for path in ("labels/a.npz", "engines/b|c.engine")]
    card = card_of(bundle, files=(*bundle.manifest.files, *more))
    assert "\n- Label sets: `labels/a.npz`\n" in card
    assert "\n- Engines: engines/b&#124;c.engine\n" in card
    assert bundle.manifest.space in card
    assert f"{len(bundle.manifest.files) + 2} files, 2.0" in card


def test_whose_space_it_is(bundle: Bundle) -> None:
    assert "No gate held the towers against a teacher." in card_of(bundle)
    files = bundle.manifest.tower("image").files
    gate = dataclasses.replace(files[0].gates[0], name=COSINE_TO_TEACHER)
    card = card_of(bundle, **with_towers(bundle.manifest, gates=(gate,)))
    assert "This is the teacher's space" in card
    assert [row[1] for row in rows(card, "Quality gates")].count(COSINE_TO_TEACHER) >= 1


def test_more_that_the_image_towers_give(bundle: Bundle) -> None:
    card = card_of(bundle, files=(*bundle.manifest.files, FileRecord("labels/a.npz", 1, "0" * 64)))
    assert "Labels inside" not in card
    assert "features of each patch" not in card
    files = (*bundle.manifest.files, FileRecord("labels/a.npz", 1, "0" * 64))
    card = card_of(bundle, files=files, label_head="a", patch_features=True)
    assert "\n- Labels inside the image towers: a\n" in card
    assert "\n- The image towers also give the features of each patch\n" in card


def test_size_counts_weights_beside_the_graph(bundle: Bundle) -> None:
    weights = FileRecord("onnx/weights.data", 3 * 10**9, "0" * 64)
    changes = with_towers(bundle.manifest, data_path=weights.path)
    table = rows(card_of(bundle, **changes, files=(*bundle.manifest.files, weights)), "Towers")
    assert {row[5] for row in table} <= {"3,000.00 MB", "3,000.01 MB"}


@pytest.mark.parametrize(
    ("config", "shown"),
    [({"model_type": "clip"}, True), ({"model_type": "vit"}, False), ([], False)],
)
def test_browser_only_where_it_can_run(
    own_bundle: Path,
    reseal: Callable[[Path], None],
    edit_manifest: Callable[..., None],
    config: object,
    shown: bool,
) -> None:
    (own_bundle / "config.json").write_text(json.dumps(config))
    reseal(own_bundle)
    bundle = Bundle.open(own_bundle)
    assert {"onnx/vision_model.onnx", "onnx/text_model.onnx"} <= {
        file.path for file in bundle.manifest.files
    }
    assert ("transformers.js" in render_card(bundle, REPO, base_model=None)) is shown
    fewer = tuple(file for file in bundle.manifest.files if file.path != "preprocessor_config.json")
    assert "transformers.js" not in card_of(bundle, files=fewer)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
        ("none", None),
        ("EmojiScenes teacher (built in)", None),
        ("/home/someone/teacher", None),
        ("./runs/teacher", None),
        ("a/b/c", None),
        ("a/b..c", None),
        ("a/b\n", None),
        ("runs/here", None),
    ],
)
def test_base_model(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: str,
    expected: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "here").mkdir(parents=True)
    provenance = dataclasses.replace(bundle.manifest.provenance, teacher=teacher)
    assert base_model(dataclasses.replace(bundle.manifest, provenance=provenance)) == expected
