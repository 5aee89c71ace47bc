"""The commands that run a bundle, through the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def index(tiny_bundle: Path, photos: Path, tmp_path: Path, capsys: Capture) -> Path:
    """An index of red.png, green.png and blue.png."""
    out = tmp_path / "index.npz"
    assert main(["embed", str(photos), "--bundle", str(tiny_bundle), "--out", str(out)]) == 0
    capsys.readouterr()
    return out


def fails(capsys: Capture, *arguments: object) -> str:
    """Run a command that must end with status 2; return its one line."""
    assert main([str(item) for item in arguments]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if "edgeclip: error:" in line]
    assert len(lines) == 1
    assert printed.out == ""
    return lines[0]


def prints_json(capsys: Capture, *arguments: object) -> Any:
    assert main([*(str(item) for item in arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class TestVerify:
    def test_whole(self, tiny_bundle: Path, capsys: Capture) -> None:
        assert main(["verify", str(tiny_bundle)]) == 0
        out = capsys.readouterr().out
        assert "tiny: 9 files" in out
        space = Bundle.open(tiny_bundle).manifest.space
        assert f"embedding space {space[:12]}, not held against its teacher by a gate" in out
        found = prints_json(capsys, "verify", tiny_bundle)
        assert (found["space"], found["held_to_teacher"]) == (space, False)
        assert out.count(" ok\n") == 4

    def test_out_of_tolerance(
        self, own_bundle: Path, edit_manifest: Callable[..., None], capsys: Capture
    ) -> None:
        bundle = Bundle.open(own_bundle)
        golden = bundle.golden()
        golden.expected[0].embeddings[0, 0] += 0.01
        golden.save(own_bundle / "golden.npz")

        def reseal_golden(data: dict[str, Any]) -> None:
            from edgeclip.runtime.bundle.files import sha256_file

            entry = next(item for item in data["files"] if item["path"] == "golden.npz")
            entry["sha256"] = sha256_file(own_bundle / "golden.npz")

        edit_manifest(own_bundle, reseal_golden)
        assert main(["verify", str(own_bundle)]) == 1
        assert capsys.readouterr().out.count("OUT OF TOLERANCE") == 1
        assert main(["verify", str(own_bundle), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["passed"] is False
        assert [item["passed"] for item in found["replays"]] == [False, True, True, True]

    def test_tampered(self, own_bundle: Path, capsys: Capture) -> None:
        path = own_bundle / "onnx" / "text_model.onnx"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert "text_model.onnx was altered" in fails(capsys, "verify", own_bundle)

    def test_half_written(self, own_bundle: Path, capsys: Capture) -> None:
        (own_bundle / "edgeclip.json").unlink()
        assert "copied in part" in fails(capsys, "verify", own_bundle)


class TestEmbed:
    def test_folder(self, index: Path, photos: Path) -> None:
        found = Index.load(index)
        assert found.keys == tuple(
            (photos / f"{name}.png").as_posix() for name in ("blue", "green", "red")
        )
        assert found.embeddings.shape == (3, 8)

    def test_batch_size_changes_nothing(
        self, tiny_bundle: Path, photos: Path, index: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "other.npz"
        bundle = str(tiny_bundle)
        options = ["--bundle", bundle, "--out", str(out), "--batch-size", "2"]
        assert main(["embed", str(photos), *options]) == 0
        one, other = Index.load(index), Index.load(out)
        assert one.keys == other.keys
        np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-6)

    def test_corrupt_file_among_100(
        self, tiny_bundle: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        folder = tmp_path / "hundred"
        folder.mkdir()
        for number in range(99):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02}.jpg")
        (folder / "broken.jpg").write_bytes((folder / "00.jpg").read_bytes()[:100])
        out = tmp_path / "index.npz"
        options = ["--bundle", str(tiny_bundle), "--out", str(out)]
        assert main(["embed", str(folder), *options]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("skipped") == 2
        assert "broken.jpg" in printed.err
        assert "skipped 1 of 100 images" in printed.err
        assert printed.out == f"99 embeddings of length 8 in {out}\n"
        found = Index.load(out)
        assert len(found.keys) == 99
        assert not any("broken" in key for key in found.keys)

        out.unlink()
        assert "broken.jpg" in fails(capsys, "embed", folder, *options, "--strict")
        assert not out.exists()

    def test_only_corrupt_files(self, tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
        (tmp_path / "a.jpg").write_bytes(b"nothing")
        out = tmp_path / "index.npz"
        line = fails(capsys, "embed", tmp_path, "--bundle", tiny_bundle, "--out", out)
        assert "none of 1 images could be read" in line
        assert not out.exists()

    def test_same_file_twice_counts_once(
        self, tiny_bundle: Path, photos: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "index.npz"
        paths = [str(photos), str(photos / "red.png")]
        assert main(["embed", *paths, "--bundle", str(tiny_bundle), "--out", str(out)]) == 0
        assert len(Index.load(out).keys) == 3

    def test_texts(self, tiny_bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "texts.txt").write_bytes("a red car\r\n green\u2028blue \na red car\n".encode())
        out = tmp_path / "index.npz"
        options = ["--texts", str(tmp_path / "texts.txt"), "--bundle", str(tiny_bundle)]
        assert main(["embed", *options, "--out", str(out)]) == 0
        found = Index.load(out)  # row i is line i
        assert found.keys == ("a red car", "green\u2028blue", "a red car")
        assert np.array_equal(found.embeddings[0], found.embeddings[2])

    def test_what_is_left_out_is_told_at_the_end(
        self, tiny_bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        (photos / "clip.mov").touch()
        out = tmp_path / "index.npz"
        arguments = ["embed", str(photos), "--bundle", str(tiny_bundle), "--out", str(out)]
        assert main(arguments) == 0
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("edgeclip: left out 1 file: ")
        assert "clip.mov" in last
        out.unlink()
        assert "clip.mov" in fails(capsys, *arguments, "--strict")
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give images or folders, or --texts FILE"),
            (["{photos}", "--texts", "x"], "and not both"),
            (["{photos}/absent"], "does not exist"),
            (["{tmp}/empty"], "holds no images"),
            (["--texts", "{tmp}/empty"], "cannot read"),
            (["--texts", "{tmp}/blank.txt"], "holds no texts"),
            (["--texts", "{tmp}/gap.txt"], "gap.txt, line 2 is empty"),
            (["--texts", "{tmp}/long.txt"], "the limit is 16"),
        ],
    )
    def test_mistakes(
        self,
        tiny_bundle: Path,
        photos: Path,
        tmp_path: Path,
        capsys: Capture,
        arguments: list[str],
        message: str,
    ) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "blank.txt").write_text("\n\n")
        (tmp_path / "gap.txt").write_text("red\n\nblue\n")
        (tmp_path / "long.txt").write_text("red " * 500)
        paths = [item.format(photos=photos, tmp=tmp_path) for item in arguments]
        out = tmp_path / "out.npz"
        line = fails(capsys, "embed", *paths, "--bundle", tiny_bundle, "--out", out)
        assert message in line
        assert not out.exists()

    def test_name_of_the_index(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        line = fails(capsys, "embed", photos, "--bundle", tiny_bundle, "--out", "index")
        assert "ends in .npz" in line


class TestClassify:
    def test_names(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        arguments = [str(photos), "--bundle", str(tiny_bundle), "--labels", "red, green,blue"]
        assert main(["classify", *arguments, "--top", "1"]) == 0
        lines = capsys.readouterr().out.split()
        assert [Path(lines[i]).stem for i in (0, 3, 6)] == [lines[i] for i in (2, 5, 8)]

    def test_a_file_of_labels(
        self,
        tiny_bundle: Path,
        photos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("labels.txt").write_text("red, or so\nblue\n")
        options = ["--bundle", tiny_bundle, "--labels"]
        found = prints_json(capsys, "classify", photos, *options, "labels.txt")
        best = found["images"][(photos / "red.png").as_posix()]
        assert [item["label"] for item in best] == ["red, or so", "blue"]
        line = fails(capsys, "classify", photos, *options, "missing.txt")
        assert "missing.txt does not exist" in line

    def test_json_and_skipped(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        (photos / "broken.png").write_bytes(b"")
        options = ["--bundle", tiny_bundle, "--labels", "red,blue", "--template", "{} car"]
        found = prints_json(capsys, "classify", photos, *options)
        assert len(found["images"]) == 3
        assert list(found["skipped"]) == [(photos / "broken.png").as_posix()]
        best = found["images"][(photos / "red.png").as_posix()]
        assert [item["label"] for item in best] == ["red", "blue"]
        assert sum(item["score"] for item in best) == pytest.approx(1, abs=1e-6)

    def test_label_file_of_another_space(
        self, tiny_bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        from edgeclip.runtime.bundle.index import LabelSet

        path = tmp_path / "labels.npz"
        rows = np.eye(2, 8, dtype=np.float32)
        LabelSet(names=("a", "b"), embeddings=rows, space="6" * 64).save(path)
        line = fails(capsys, "classify", photos, "--bundle", tiny_bundle, "--labels", path)
        assert "embedding space" in line

    def test_no_names(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        line = fails(capsys, "classify", photos, "--bundle", tiny_bundle, "--labels", " , ")
        assert "empty name" in line

    def test_no_labels_and_no_head(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        line = fails(capsys, "classify", photos, "--bundle", tiny_bundle)
        assert "--labels" in line


class TestSearch:
    def test_texts_and_images(
        self, tiny_bundle: Path, index: Path, photos: Path, capsys: Capture
    ) -> None:
        options = ["--bundle", tiny_bundle, "--index", index, "--top", 1]
        image = photos / "blue.png"
        found = prints_json(capsys, "search", "a red apple", "green", *options, "--image", image)
        assert {query: Path(hits[0]["key"]).stem for query, hits in found.items()} == {
            "a red apple": "red",
            "green": "green",
            str(image): "blue",
        }
        assert found[str(image)][0]["score"] == pytest.approx(1, abs=1e-6)

    def test_table(self, tiny_bundle: Path, index: Path, capsys: Capture) -> None:
        options = ["--bundle", str(tiny_bundle), "--index", str(index)]
        assert main(["search", "the blue sea", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "the blue sea"
        assert lines[1].endswith("blue.png")
        assert len(lines) == 4

    def test_a_line_break_in_a_name_breaks_no_line(
        self, tiny_bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        (photos / "red.png").rename(photos / "red\nor not.png")
        out = tmp_path / "broken.npz"
        options = ["--bundle", str(tiny_bundle)]
        folder = tmp_path / "alone"
        folder.mkdir()
        shutil.copy(photos / "red\nor not.png", folder)
        assert main(["embed", str(folder), *options, "--out", str(out)]) == 0
        capsys.readouterr()
        assert main(["search", "red", *options, "--index", str(out)]) == 0
        assert capsys.readouterr().out.splitlines()[1].endswith("red\\nor not.png")
        assert main(["classify", str(folder), *options, "--labels", "red,blue"]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith("red\\nor not.png")

    def test_the_name_of_an_image_is_no_text(
        self, tiny_bundle: Path, index: Path, photos: Path, capsys: Capture
    ) -> None:
        image = photos / "red.png"
        line = fails(capsys, "search", image, "--bundle", tiny_bundle, "--index", index)
        assert f"search by it with --image {image}" in line

    def test_nothing_to_look_for(self, tiny_bundle: Path, index: Path, capsys: Capture) -> None:
        line = fails(capsys, "search", "--bundle", tiny_bundle, "--index", index)
        assert "nothing to search for" in line
        line = fails(capsys, "search", "  ", "--bundle", tiny_bundle, "--index", index)
        assert "a text to search for is empty" in line
        line = fails(capsys, "classify", index, "--bundle", tiny_bundle, "--labels", "")
        assert "--labels is empty" in line
        words = ["search", "no-such.png", "--bundle", str(tiny_bundle), "--index", str(index)]
        assert main(words) == 0
        assert "no-such.png is searched for as a text" in capsys.readouterr().err

    def test_damaged_index(self, tiny_bundle: Path, index: Path, capsys: Capture) -> None:
        index.write_bytes(index.read_bytes()[:-50])
        line = fails(capsys, "search", "red", "--bundle", tiny_bundle, "--index", index)
        assert "index.npz" in line

    def test_index_of_another_space(self, tiny_bundle: Path, index: Path, capsys: Capture) -> None:
        found = Index.load(index)
        Index(found.keys, found.embeddings, "6" * 64).save(index)
        line = fails(capsys, "search", "red", "--bundle", tiny_bundle, "--index", index)
        assert "embedding space" in line

    def test_precision_that_the_bundle_lacks(
        self, tiny_bundle: Path, index: Path, capsys: Capture
    ) -> None:
        options = ["--bundle", tiny_bundle, "--index", index, "--precision", "fp16"]
        assert "has no fp16" in fails(capsys, "search", "red", *options)


class TestEval:
    def test_retrieval(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        found = prints_json(capsys, "eval", photos, "--bundle", tiny_bundle)
        assert (found["images"], found["captions"], found["skipped"]) == (3, 3, 0)
        assert found["mean_r1"] == {
            "value": 1.0,
            "low": pytest.approx(0.292, abs=1e-3),
            "high": 1.0,
        }
        assert found["image to text"]["median_rank"] == 1

    def test_equal_and_several_captions_are_right(
        self, tiny_bundle: Path, photos: Path, capsys: Capture
    ) -> None:
        rows = ["file,caption"]
        for path in sorted(photos.glob("*.png")):
            copy = photos / f"copy-{path.name}"
            shutil.copy(path, copy)
            rows += [f'{path.name},"a photo, {path.stem}"', f"{path.name},{path.stem}"]
            rows += [f'{copy.name},"a photo,  {path.stem}"', f"{copy.name},{path.stem}"]
        (photos / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        found = prints_json(capsys, "eval", photos, "--bundle", tiny_bundle)
        assert (found["images"], found["captions"]) == (6, 12)
        assert found["mean_r1"]["value"] == 1

    def test_captions_that_tell_nothing(
        self, tiny_bundle: Path, photos: Path, capsys: Capture
    ) -> None:
        (photos / "captions.csv").unlink()
        for path in list(photos.iterdir()):
            path.with_suffix(".txt").write_text("a photo")
        line = fails(capsys, "eval", photos, "--bundle", tiny_bundle)
        assert "each caption is right for every image" in line

    def test_wrong_captions_show(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        table = photos / "captions.csv"
        text = table.read_text(encoding="utf-8")
        table.write_text(text.replace("a photo, red", "the blue sea"), encoding="utf-8")
        found = prints_json(capsys, "eval", photos, "--bundle", tiny_bundle)
        assert found["image to text"]["r1"]["value"] < 1

    def test_table_and_skipped_images(
        self, tiny_bundle: Path, photos: Path, capsys: Capture
    ) -> None:
        (photos / "red.png").write_bytes(b"")
        assert main(["eval", str(photos), "--bundle", str(tiny_bundle)]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("2 images, 2 captions;")
        assert "image to text 100.0% [15.8%, 100.0%]" in printed.out
        assert "skipped 1 of 3 images" in printed.err

    def test_zero_shot(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        (photos / "captions.csv").unlink()
        for path in list(photos.iterdir()):
            (photos / path.stem).mkdir()
            shutil.move(path, photos / path.stem / "1.png")
        found = prints_json(capsys, "eval", photos, "--labels", "--bundle", tiny_bundle)
        assert (found["images"], found["classes"]) == (3, 3)
        assert found["top1"]["value"] == 1
        assert main(["eval", str(photos), "--labels", "--bundle", str(tiny_bundle)]) == 0
        assert "top-1  100.0%" in capsys.readouterr().out
        shutil.move(photos / "red" / "1.png", photos / "blue" / "2.png")
        (photos / "red").rmdir()
        found = prints_json(capsys, "eval", photos, "--labels", "--bundle", tiny_bundle)
        assert found["top1"]["value"] < 1

    def test_image_outside_every_class(
        self, tiny_bundle: Path, photos: Path, capsys: Capture
    ) -> None:
        line = fails(capsys, "eval", photos, "--labels", "--bundle", tiny_bundle)
        assert "is in no class" in line

    def test_no_captions(self, tiny_bundle: Path, photos: Path, capsys: Capture) -> None:
        (photos / "captions.csv").unlink()
        assert "has no captions" in fails(capsys, "eval", photos, "--bundle", tiny_bundle)
