import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME, check_path, tower_path
from edgeclip.runtime.bundle.manifest import (
    COSINE_TO_TEACHER,
    SCHEMA_VERSION,
    DataRecord,
    GateRecord,
    GateRemark,
    Manifest,
    gates_table,
)
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.errors import BundleError

HASH = "0" * 64
DATA = {"name": "photos", "count": 40, "sha256": HASH}
GATE = {
    **{"name": "R@1 loss int8", "value": 0.5, "low": 0.0, "high": 1.0, "bound": 1.0},
    **{"direction": "<=", "unit": "points", "outcome": "passed", "data": DATA},
}


@pytest.fixture
def text(tiny_bundle: Path) -> str:
    return (tiny_bundle / MANIFEST_NAME).read_text(encoding="utf-8")


def changed(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


def test_json_round_trip(text: str) -> None:
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_what_gates_were_measured_on_comes_back(text: str) -> None:
    remark = {"subject": "image int8", "gate": "zero-shot top-1 loss", "says": "not judged"}

    def change(data: dict[str, Any]) -> None:
        data["gates"].append(GATE)
        data["remarks"].append(remark)

    manifest = Manifest.from_json(changed(text, change))
    assert manifest.gates[0].data == DataRecord("photos", 40, HASH)
    assert str(manifest.remarks[0]) == "image int8: zero-shot top-1 loss: not judged"
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_what_is_unusual_of_the_inputs_is_written_only_where_it_is_so(text: str) -> None:
    usual = json.loads(text)["spec"]
    assert "stretch" not in usual["image"]
    assert "pad_to_context" not in usual["text"]

    def change(data: dict[str, Any]) -> None:
        data["spec"]["image"]["stretch"] = True
        data["spec"]["text"] |= {"pad_to_context": True, "bos_id": None}

    manifest = Manifest.from_json(changed(text, change))
    assert manifest.spec.image.stretch
    assert manifest.spec.text.pad_to_context
    assert manifest.spec.text.frame[0] == ()
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_only_a_gate_says_that_the_space_is_the_teachers(text: str) -> None:
    assert not Manifest.from_json(text).held_to_teacher  # as in a bundle from before such gates
    gate = {**GATE, "name": COSINE_TO_TEACHER, "direction": ">=", "bound": -0.1}

    def change(data: dict[str, Any]) -> None:
        data["towers"][1]["files"][0]["gates"].append(gate)

    assert Manifest.from_json(changed(text, change)).held_to_teacher


def test_a_bundle_may_have_no_text_tower(text: str) -> None:
    def change(data: dict[str, Any]) -> None:
        data["towers"] = [tower for tower in data["towers"] if tower["tower"] == "image"]
        data["files"] = [file for file in data["files"] if file["path"] != "tokenizer.json"]

    manifest = Manifest.from_json(changed(text, change))
    assert manifest.has("image")
    assert not manifest.has("text")
    with pytest.raises(BundleError, match="has no text tower: export it without --no-text"):
        manifest.tower("text")


def test_lookups(text: str) -> None:
    manifest = Manifest.from_json(text)
    image = manifest.tower("image")
    assert image.precisions == ("fp32", "int8")
    assert image.file().path == "onnx/vision_device_int8.onnx"
    assert image.file("fp32").path == "onnx/vision_model.onnx"
    assert image.file("int8").pixels == "uint8-nhwc"
    with pytest.raises(BundleError, match="no fp16 image tower; it has fp32, int8"):
        image.file("fp16")
    assert [what for what, _ in manifest.all_gates()] == [
        *("image fp32", "image int8", "text fp32", "text int8")
    ]


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, 99])
def test_other_schema_version_comes_before_every_other_mistake(text: str, version: int) -> None:
    def change(data: dict[str, Any]) -> None:
        data.clear()
        data.update(schema_version=version, nonsense=1)

    broken = changed(text, change).replace("{", '{"twice": 1, "twice": 2, ', 1)
    message = f"has schema version {version}, but this software reads version {SCHEMA_VERSION}"
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(broken)


@pytest.mark.parametrize("version", ["1", 1.0, True, None, [1]])
def test_schema_version_must_be_an_integer(text: str, version: object) -> None:
    with pytest.raises(BundleError, match="gives no schema_version as an integer"):
        Manifest.from_json(changed(text, lambda data: data.update(schema_version=version)))


@pytest.mark.parametrize("broken", ["", "[]", "null", "1", "{}"])
def test_json_that_is_no_manifest(broken: str) -> None:
    with pytest.raises(BundleError, match=r"not complete JSON|gives no schema_version"):
        Manifest.from_json(broken)


@given(st.floats(0, 0.999))
def test_truncated_json_is_refused(tiny_bundle: Path, share: float) -> None:
    whole = (tiny_bundle / MANIFEST_NAME).read_text(encoding="utf-8").rstrip()
    with pytest.raises(BundleError, match="not complete JSON"):
        Manifest.from_json(whole[: int(len(whole) * share)])


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(BundleError, match="not complete JSON"):
        Manifest.from_json("[" * 200_000)


def test_duplicate_key_at_any_depth_is_refused(text: str) -> None:
    broken = text.replace('"dim": 8', '"dim": 4, "dim": 8')
    assert broken != text
    with pytest.raises(BundleError, match="names a key twice: dim"):
        Manifest.from_json(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour=1), "colour: unknown key"),
        (lambda d: d["spec"]["image"].update(colour=1), "spec.image.colour: unknown key"),
        (lambda d: d.pop("licence"), "licence"),
        (lambda d: d["spec"].update(dim="8"), "spec.dim"),
        (lambda d: d["spec"].update(logit_scale=float("nan")), "not plain data|NaN|nan"),
        (lambda d: d.update(space="abc"), "space must be 64"),
        (lambda d: d["towers"].clear(), "towers must be image and text"),
        (lambda d: d["towers"].pop(0), "once each, or image alone"),
        (lambda d: d["gates"].append(GATE | {"data": DATA | {"count": 0}}), "on 0 items"),
        (lambda d: d["gates"].append(GATE | {"data": DATA | {"sha256": "x"}}), "lower-case hexa"),
        (lambda d: d["remarks"].append({"subject": "bundle"}), "remarks.0.gate"),
        (lambda d: d["towers"].append(d["towers"][0]), "towers must be image and text"),
        (lambda d: d["towers"][0].update(chosen="fp16"), "chosen fp16 is not in the bundle"),
        (lambda d: d["towers"][0]["files"].append(d["towers"][0]["files"][0]), "listed twice"),
        (lambda d: d["towers"][0]["files"][0].update(golden_tolerance=0), "golden_tolerance"),
        (lambda d: d["files"].append(d["files"][0]), "a file is listed twice"),
        (lambda d: d["files"].append(d["files"][0] | {"path": "CONFIG.json"}), "listed twice"),
        (lambda d: d["files"].clear(), "files does not list golden.npz"),
        (lambda d: d["files"][0].update(bytes=-1), "size cannot be negative"),
        (lambda d: d["files"][0].update(sha256="A" * 64), "lower-case hexadecimal"),
    ],
)
def test_mistakes_are_one_line_that_names_them(
    text: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_json(changed(text, change))
    assert "\n" not in str(caught.value)


UNSAFE = [
    *("/etc/passwd", "../up", "a/../../up", "a/..", "..", ".", "./a", "a//b", "a/", "", "/"),
    *("a\\b", "..\\up", "C:/a", "C:a", "a\0b", "a\nb", "edgeclip.json", "EdgeClip.json"),
]


@pytest.mark.parametrize("path", UNSAFE)
def test_unsafe_path_in_the_manifest_is_refused(text: str, path: str) -> None:
    entry = {"path": path, "bytes": 1, "sha256": HASH}
    with pytest.raises(BundleError, match=r"unsafe path|cannot list itself"):
        Manifest.from_json(changed(text, lambda data: data["files"].append(entry)))
    with pytest.raises(BundleError, match=r"unsafe path|cannot list itself"):
        Manifest.from_json(
            changed(text, lambda data: data["towers"][0]["files"][0].update(path=path))
        )


@given(st.text(max_size=30))
def test_accepted_paths_stay_inside(path: str) -> None:
    try:
        check_path(path)
    except ValueError:
        return
    root = Path("/bundle")
    joined = root / path
    assert joined.is_relative_to(root)
    assert joined != root
    assert not {"..", "."} & set(path.split("/"))


def test_tower_names_are_those_of_the_ecosystem() -> None:
    assert tower_path("image", "fp32") == "onnx/vision_model.onnx"
    assert tower_path("text", "fp16") == "onnx/text_model_fp16.onnx"
    assert tower_path("image", "int8") == "onnx/vision_model_int8.onnx"
    assert tower_path("image", "int8", "uint8-nhwc") == "onnx/vision_device_int8.onnx"
    assert tower_path("text", "int8", None) == "onnx/text_model_int8.onnx"


def test_gate_cannot_claim_to_have_passed(text: str) -> None:
    gate = next(iter(Manifest.from_json(text).all_gates()))[1]
    with pytest.raises(ValueError, match="recorded as passed, but its interval misses it"):
        dataclasses.replace(gate, bound=0.9985)  # below the value, above the lower end
    with pytest.raises(ValueError, match="recorded as passed, but its interval misses it"):
        dataclasses.replace(gate, direction="<=")
    with pytest.raises(ValueError, match="recorded as failed, but its interval may keep it"):
        dataclasses.replace(gate, bound=0.9985, outcome="failed")
    unsure = dataclasses.replace(gate, bound=0.9985, outcome="undecided")
    assert (unsure.passed, unsure.is_inside) == (False, True)
    failed = dataclasses.replace(gate, bound=1.1, outcome="failed")
    assert (failed.passed, failed.is_inside) == (False, False)


PHOTOS = DataRecord("photos, 1,000 pictures", 1000, "ab" * 32)
R1_GATE = GateRecord(
    name="R@1 loss int8 images, fp32 texts",
    value=0.25,
    low=-0.1,
    high=0.6,
    bound=1.0,
    direction="<=",
    unit="points",
    outcome="passed",
    data=PHOTOS,
)
REMARK = GateRemark("image int8", "zero-shot top-1 loss", "not judged: no labels")


@pytest.fixture
def recorded(own_bundle: Path) -> Path:
    """A bundle whose gates say what they were measured on."""
    manifest = Bundle.open(own_bundle).manifest
    changed = dataclasses.replace(manifest, gates=(R1_GATE,), remarks=(REMARK,))
    (own_bundle / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
    return own_bundle


def test_a_line_for_each_gate_then_data_then_remarks() -> None:
    other = dataclasses.replace(
        R1_GATE, data=dataclasses.replace(PHOTOS, name="labelled", count=300)
    )
    missed = dataclasses.replace(R1_GATE, value=2.0, high=3.0, outcome="undecided")
    bare = dataclasses.replace(R1_GATE, data=None)
    gates = [
        ("image int8", R1_GATE),
        ("image int8", other),
        ("text int8", missed),
        ("bundle", bare),
    ]
    lines = gates_table(gates, [REMARK]).splitlines()
    assert [line.split()[-2:] for line in lines[1:5]] == [
        *(["[1]", "passed"], ["[2]", "passed"], ["[1]", "undecided"], ["points", "passed"])
    ]
    assert "0.25000  -0.10000 to 0.60000  <= 1 points" in lines[1]
    assert lines[5:] == [
        "data [1]: photos, 1,000 pictures; 1,000 measured; sha256 " + "ab" * 8,
        "data [2]: labelled; 300 measured; sha256 " + "ab" * 8,
        "warning: image int8: zero-shot top-1 loss: not judged: no labels",
    ]


def test_an_interval_without_an_end_is_kept_and_shown(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_ended = dataclasses.replace(R1_GATE, high=math.inf, outcome="undecided")
    manifest = dataclasses.replace(Bundle.open(recorded).manifest, gates=(open_ended,))
    (recorded / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    assert Bundle.open(recorded).manifest.gates == (open_ended,)
    assert "at least -0.10000" in gates_table([("bundle", open_ended)])
    main(["verify", str(recorded), "--json"])
    (shown,) = [g for g in json.loads(capsys.readouterr().out)["gates"] if g["what"] == "bundle"]
    assert (shown["low"], shown["high"]) == (-0.1, None)


def test_nothing_in_a_name_reaches_the_terminal() -> None:
    named = dataclasses.replace(R1_GATE, name="\x1b[31mred\nline")
    table = gates_table([("image\x07", named)], [GateRemark("a\n", "\x1b", "c")])
    assert len(table.splitlines()) == 4
    assert not set("\x1b\x07") & set(table)


def test_verify_prints_what_was_measured(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(recorded)]) == 0
    out = capsys.readouterr().out
    assert "gates, as measured when the bundle was written:" in out
    assert "R@1 loss int8 images, fp32 texts" in out
    assert "data [1]: photos, 1,000 pictures; 1,000 measured" in out
    assert "warning: image int8: zero-shot top-1 loss: not judged: no labels" in out
    assert main(["verify", str(recorded), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gates"][-1] == {"what": "bundle", **dataclasses.asdict(R1_GATE)}
    assert found["remarks"] == [dataclasses.asdict(REMARK)]
