"""Certify a cascade of two real bundles: evaluator, certification, command, faults."""

import argparse
import dataclasses
import json
import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.export.bundle.build_bundle import BuiltBundle
from edgeclip.export.cascade.cascade_eval_set import (
    CascadeEvalSet,
    retrieval_eval_set,
    zero_shot_eval_set,
)
from edgeclip.export.cascade.cascade_evaluator import CascadeEvaluator, IndexBy, query_bytes
from edgeclip.export.cascade.certify import (
    CascadePlan,
    certify,
    choose_threshold,
    disagreement,
    fixed_sequence_test,
    watched_shares,
)
from edgeclip.export.cli import cascade
from edgeclip.export.errors import ExportError
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.certificate import (
    ESCALATE_ALL,
    ESCALATE_NONE,
    PairedOutcomes,
    needs_teacher,
    read_certificate,
    threshold_grid,
)
from edgeclip.runtime.cascade.scores import Agreement, Entropy, Margin, Score, Similarities
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError, EdgeClipError, InputError, SpaceMismatchError
from edgeclip.runtime.spec import Tower

pytestmark = pytest.mark.slow

COUNTS = {"test": 300, "calibration": 120}
COLOURS = ("blue", "green", "red")
Blobs = Callable[..., Any]


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat pictures between two colours, in the folder of the stronger one."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for number in range(count):
            first, second = rng.permutation(3)[:2]
            mixed = rng.uniform(0.0, 0.48)
            colour = np.eye(3)[::-1][[first, second]] * [[1 - mixed], [mixed]]
            path = folder / part / COLOURS[first] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            flat = (20 + 200 * colour.sum(axis=0)).astype(np.uint8)
            Image.fromarray(np.broadcast_to(flat, (10, 10, 3)).copy()).save(path)
    return folder


@pytest.fixture
def worse_bundle(own_bundle: Path, reseal: Callable[[Path], None]) -> Path:
    """The tiny bundle with an image tower that confuses colours: fp32 only is worse."""
    path = own_bundle / "onnx" / "vision_model.onnx"
    model = onnx.load(path)
    for constant in model.graph.initializer:
        if constant.name == "weights":
            weights = numpy_helper.to_array(constant).copy()
            weights[0, 1] += 0.75  # red looks greenish
            constant.CopyFrom(numpy_helper.from_array(weights, "weights"))
    onnx.save(model, path)
    reseal(own_bundle)
    return own_bundle


@pytest.fixture
def cascade_plan(
    worse_bundle: Path, tiny_bundle: Path, colours: Path, cpu_device: DeviceProfile
) -> CascadePlan:
    return CascadePlan(
        student=Encoder.open(worse_bundle, device=cpu_device, precision="fp32"),
        teacher=Encoder.open(tiny_bundle, device=cpu_device, precision="fp32"),
        eval_set=zero_shot_eval_set(str(colours), size=8),
        score=Margin(),
        command="pytest",
    )


class TestCascadeEvaluator:
    @pytest.mark.parametrize("index_by", ["teacher", "student"])
    @pytest.mark.parametrize(
        ("query", "score"),
        [
            ("image", Margin()),
            ("image", Entropy(logit_scale=20.0)),
            ("image", Agreement(views=2)),
            ("image", Agreement(views=3, measure="answer")),
            ("text", Margin()),
            ("text", Entropy(logit_scale=20.0)),
        ],
    )
    def test_agrees_with_one_query_at_a_time(
        self,
        built: BuiltBundle,
        blobs: Blobs,
        cpu_device: DeviceProfile,
        query: Tower,
        index_by: IndexBy,
        score: Score,
    ) -> None:
        student = Encoder.open(built.bundle.path, device=cpu_device, precision="fp16")
        teacher = Encoder.open(built.bundle.path, device=cpu_device, precision="fp32")
        gallery, test = blobs(9, seed=1), blobs(6, seed=4)  # no caption comes twice
        asked = CascadeEvalSet(query=query, calibration=gallery, test=test, gallery=gallery)
        outcomes = CascadeEvaluator(student, teacher, asked, score, index_by).paired_outcomes(test)
        for number in range(len(test)):
            indexer = teacher if index_by == "teacher" else student
            found = _one(student, indexer, query, gallery, test, number, score.views)
            # Alone and in a batch, sums are made in another order and then rounded to fp16.
            assert score.of(found)[0] == pytest.approx(outcomes.scores[number], abs=2e-4)
            assert _own_is_best(found) == outcomes.student[number]
            first = found.cosines.argmax()
            found = _one(teacher, indexer, query, gallery, test, number, 0)
            assert _own_is_best(found) == outcomes.escalated[number]
            assert outcomes.agree is not None
            assert (found.cosines.argmax() == first) == outcomes.agree[number]
            found = _one(teacher, teacher, query, gallery, test, number, 0)
            assert _own_is_best(found) == outcomes.teacher[number]

    def test_copies_of_the_right_entry_do_not_compete(
        self, built: BuiltBundle, blobs: Blobs, cpu_device: DeviceProfile
    ) -> None:
        encoder = Encoder.open(built.bundle.path, device=cpu_device, precision="fp32")
        gallery = blobs(8, seed=1)
        asked = CascadeEvalSet(query="text", calibration=gallery, test=gallery, gallery=gallery)
        outcomes = CascadeEvaluator(encoder, encoder, asked, Margin()).paired_outcomes(gallery)
        texts = encoder.encode_text([gallery.caption(i) for i in range(8)])
        images = encoder.encode_image([gallery[i].image for i in range(8)])
        cosines = texts @ images.T
        assert outcomes.student.tolist() == (cosines.argmax(axis=1) == np.arange(8)).tolist()

    def test_other_spaces_and_views_of_texts_are_refused(
        self,
        built: BuiltBundle,
        tiny_bundle: Path,
        blobs: Blobs,
        cpu_device: DeviceProfile,
    ) -> None:
        first = Encoder.open(built.bundle.path, device=cpu_device)
        second = Encoder.open(tiny_bundle, device=cpu_device)
        pairs = blobs(4)
        asked = CascadeEvalSet(query="text", calibration=pairs, test=pairs, gallery=pairs)
        with pytest.raises(SpaceMismatchError):
            CascadeEvaluator(first, second, asked, Margin())
        with pytest.raises(InputError, match="views"):
            CascadeEvaluator(first, first, asked, Agreement())


class TestCertify:
    def test_a_worse_student_escalates_some(
        self, cascade_plan: CascadePlan, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, logger="edgeclip.export.cascade"):
            found = certify(cascade_plan)
        outcomes, made = found.outcomes, found.certificate
        assert outcomes.teacher.mean() > outcomes.student.mean() + 0.05
        assert made is not None
        assert 0 < made.escalated.value < 1
        assert made.quality.kept.value >= 0.95
        assert made.quality.cascade.value == outcomes.correct(made.threshold).mean()
        assert made.tested_on.count == COUNTS["test"]
        assert made.tested_on.entries == 3
        assert made.escalated.low < made.escalated.value < made.escalated.high
        assert made.watched
        assert made.disagreement is not None
        assert outcomes.agree is not None
        alone = outcomes.scores >= made.threshold
        assert made.disagreement.value == (~outcomes.agree[alone]).mean() < made.disagreement.high
        assert (made.try_number, made.tested_at) == (None, 0.05)
        assert len(caplog.messages) == 3

    def test_is_repeatable(self, cascade_plan: CascadePlan) -> None:
        first, second = certify(cascade_plan).certificate, certify(cascade_plan).certificate
        assert first is not None
        assert second is not None
        assert dataclasses.replace(first, created="") == dataclasses.replace(second, created="")

    def test_holds_for_its_student_only(
        self, cascade_plan: CascadePlan, cpu_device: DeviceProfile, tiny_bundle: Path
    ) -> None:
        made = certify(cascade_plan).certificate
        assert made is not None
        made.check(cascade_plan.student.bundle.manifest, cascade_plan.student.precisions)
        with pytest.raises(EdgeClipError, match="another image tower"):
            made.check(cascade_plan.teacher.bundle.manifest, cascade_plan.teacher.precisions)

    def test_too_few_queries_certify_nothing(
        self, cascade_plan: CascadePlan, colours: Path, tmp_path: Path
    ) -> None:
        few = tmp_path / "few"
        shutil.copytree(colours / "calibration", few / "calibration")
        for colour in COLOURS:
            (few / "test" / colour).mkdir(parents=True)
            for path in sorted((colours / "test" / colour).iterdir())[:5]:
                shutil.copy(path, few / "test" / colour)
        found = certify(
            dataclasses.replace(cascade_plan, eval_set=zero_shot_eval_set(str(few), size=8))
        )
        assert found.certificate is None
        assert found.count == 0

    def test_shares_out_of_range_are_refused(self, cascade_plan: CascadePlan) -> None:
        for bound, delta in ((0.0, 0.05), (1.01, 0.05), (0.95, 0.0), (0.95, 1.0)):
            with pytest.raises(InputError, match="0 < share <= 1 and 0 < delta < 1"):
                dataclasses.replace(cascade_plan, bound=bound, delta=delta)

    def test_a_student_is_no_teacher_of_its_own(self, cascade_plan: CascadePlan) -> None:
        with pytest.raises(InputError, match="has the image tower of its student in fp32"):
            dataclasses.replace(cascade_plan, teacher=cascade_plan.student)
        rounded = Encoder(cascade_plan.student.bundle, cascade_plan.student.device, "int8")
        dataclasses.replace(
            cascade_plan, student=rounded, teacher=cascade_plan.student
        )  # fp32 may teach int8


class TestQuestions:
    def test_emoji_by_name(self) -> None:
        asked = retrieval_eval_set("emoji", "image", calibration=3, test=4, gallery=5, size=16)
        assert (asked.task, asked.entry_count) == ("retrieval", 6)
        other = retrieval_eval_set("emoji", "text", calibration=3, test=4, gallery=5, size=16)
        assert asked.identity != other.identity
        assert len(asked.identity) == 64

    def test_classes_are_the_folders(self, colours: Path) -> None:
        asked = zero_shot_eval_set(str(colours), size=8)
        assert asked.labels == COLOURS
        assert (asked.task, asked.entry_count) == ("zero-shot", 3)

    def test_what_cannot_be_asked_is_refused(self, photos: Path, blobs: Blobs) -> None:
        with pytest.raises(ConfigError, match="needs a folder"):
            zero_shot_eval_set("emoji", size=8)
        mute = blobs(4, has_captions=False)
        with pytest.raises(ConfigError, match="needs pictures with captions"):
            CascadeEvalSet(query="image", calibration=mute, test=mute, gallery=mute)
        with pytest.raises(ConfigError, match="two labels"):
            CascadeEvalSet(query="image", calibration=mute, test=mute, labels=("one",))

    def test_bytes_of_a_query(self, colours: Path) -> None:
        drawn = EmojiSource("test", 2, size=32)
        assert 100 < query_bytes(drawn, "image") < 32 * 32 * 3
        assert query_bytes(drawn, "text") == np.mean([len(drawn.caption(i)) for i in range(2)])
        folder = zero_shot_eval_set(str(colours), size=8).test
        sizes = [path.stat().st_size for path in folder.paths[:100]]  # type: ignore[attr-defined]
        assert query_bytes(folder, "image") == np.mean(sizes)


class TestAddToBundle:
    def test_adds_and_replaces(self, own_bundle: Path) -> None:
        first = add_to_bundle(Bundle.open(own_bundle), "cascade/image.json", b"one")
        assert first.file_bytes("cascade/image.json") == b"one"
        second = add_to_bundle(first, "cascade/image.json", b"two, longer")
        assert second.file_bytes("cascade/image.json") == b"two, longer"
        assert len(second.manifest.files) == len(first.manifest.files)
        assert Encoder.open(own_bundle).encode_text("a red apple").shape == (1, 8)

    @pytest.mark.parametrize("killed_at", range(4))
    def test_killed_at_any_rename_the_bundle_is_whole(
        self, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
    ) -> None:
        bundle = add_to_bundle(Bundle.open(own_bundle), "cascade/image.json", b"one")
        renames = 0
        rename = Path.replace

        def killed(path: Path, target: Path) -> Path:
            nonlocal renames
            if renames == killed_at:
                raise KeyboardInterrupt
            renames += 1
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            if killed_at < 3:
                with pytest.raises(KeyboardInterrupt):
                    add_to_bundle(bundle, "cascade/image.json", b"two")
            else:
                add_to_bundle(bundle, "cascade/image.json", b"two")
        left = Bundle.open(own_bundle)
        declared = "cascade/image.json" in {file.path for file in left.manifest.files}
        assert declared is (killed_at in (0, 3))
        add_to_bundle(left, "cascade/image.json", b"three")

    def test_paths_that_are_not_for_this_are_refused(self, own_bundle: Path) -> None:
        bundle = Bundle.open(own_bundle)
        for path in ("../x", "onnx/x.onnx", "labels/x.npz", "tokenizer.json", "edgeclip.json"):
            with pytest.raises(ExportError, match=r"cannot be added|lies among"):
                add_to_bundle(bundle, path, b"")
        assert Bundle.open(own_bundle).manifest == bundle.manifest

    def test_a_bundle_that_changed_meanwhile_is_left_alone(self, own_bundle: Path) -> None:
        old = Bundle.open(own_bundle)
        add_to_bundle(old, "cascade/text.json", b"theirs")
        with pytest.raises(ExportError, match="changed meanwhile"):
            add_to_bundle(old, "cascade/image.json", b"ours")


class TestVerb:
    def run(self, *words: object) -> int:
        parser = argparse.ArgumentParser()
        cascade.add_arguments(parser)
        given = [str(word) for word in words]
        typed = argparse.Namespace(command=shlex.join(["edgeclip", "cascade", *given]))
        return cascade.run(parser.parse_args(given, typed))

    @pytest.fixture
    def words(
        self,
        worse_bundle: Path,
        tiny_bundle: Path,
        colours: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> list[object]:
        monkeypatch.setenv("EDGECLIP_STATE", str(tmp_path / "state"))
        device = tmp_path / "fp32.yaml"
        device.write_text(
            "name: exact\ndescription: fp32 only\nengine: onnxruntime-cpu\n"
            "precisions: [fp32]\nthreads: 1\nmemory_mb: 1000\n"
        )
        words = [worse_bundle, "--teacher", tiny_bundle, "--data", colours, "--labels"]
        words += ["--cluster-by", "none"]  # flat pictures of one colour are the same to a teacher
        return [*words, "--device", device, "--workload", _quick(tmp_path)]

    def test_writes_certificate_and_page(
        self,
        words: list[object],
        worse_bundle: Path,
        tmp_path: Path,
        cpu_device: DeviceProfile,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        page = tmp_path / "page.html"
        assert self.run(*words, "--page", page, "--link", "wifi") == 0
        out = capsys.readouterr().out
        assert "escalated" in out
        assert "Keeps at least 95% of the quality of tiny at classifying pictures by 3" in out
        assert "first try on these queries, so it has 1/2 of delta" in out
        made = read_certificate(Bundle.open(worse_bundle))
        assert made is not None
        assert "--labels" in made.command
        html = page.read_text(encoding="utf-8")
        assert html.count("<svg") == 2
        assert "certified:" in html
        cascade = Cascade.certified(Encoder.open(worse_bundle, device=cpu_device, precision="fp32"))
        assert cascade.threshold == made.threshold
        assert cascade.labels is not None
        assert cascade.labels.teacher.names == COLOURS

    @pytest.mark.parametrize("index_by", ["teacher", "student"])
    def test_certified_labels_are_in_the_bundle(
        self, words: list[object], worse_bundle: Path, cpu_device: DeviceProfile, index_by: str
    ) -> None:
        assert self.run(*words, "--index-by", index_by) == 0
        student = Encoder.open(worse_bundle, device=cpu_device, precision="fp32")
        cascade = Cascade.certified(student)
        assert cascade.certificate is not None
        assert cascade.labels is not None
        assert cascade.certificate.tested_on.index_by == index_by
        cascade.certificate.check_labels(cascade.labels.entries)

    def test_ledger_is_kept_between_runs(
        self, words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ledger = tmp_path / "tries.json"
        for score, part in (("margin", "1/2"), ("entropy", "1/6"), ("margin", "1/2")):
            self.run(*words, "--dry-run", "--score", score, "--ledger", ledger)
            assert f"it has {part} of delta" in capsys.readouterr().out
        ledger.write_text("{")
        with pytest.raises(InputError, match="put back a copy"):
            self.run(*words, "--dry-run", "--ledger", ledger)

    def test_by_default_one_ledger_is_for_every_path(
        self,
        words: list[object],
        colours: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.run(*words, "--dry-run")
        assert "it has 1/2 of delta" in capsys.readouterr().out
        words[words.index(colours)] = shutil.copytree(colours, tmp_path / "elsewhere")
        self.run(*words, "--dry-run", "--score", "entropy")
        assert "it has 1/6 of delta" in capsys.readouterr().out

    def test_dry_run_leaves_the_bundle_alone(
        self, words: list[object], worse_bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = Bundle.open(worse_bundle).manifest
        assert self.run(*words, "--dry-run", "--json", "--score", "entropy") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["certificate"]["score"]["kind"] == "entropy"
        assert found["curve"][0]["escalated"] == 1.0
        assert found["costs"]["teacher_ms"] > 0
        assert Bundle.open(worse_bundle).manifest == before

    def test_nothing_certified_ends_with_1(
        self, words: list[object], worse_bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(*words, "--share", "1.0") == 1
        out = capsys.readouterr().out
        assert "Nothing is certified" in out
        assert "pictures added to the subfolder test/ alone" in out
        assert read_certificate(Bundle.open(worse_bundle)) is None

    def test_a_copy_of_the_student_is_refused_as_its_teacher(
        self, words: list[object], worse_bundle: Path, tmp_path: Path
    ) -> None:
        words[2] = shutil.copytree(worse_bundle, tmp_path / "copy")
        with pytest.raises(InputError, match="it would change no answer: name the bundle of a"):
            self.run(*words)
        assert read_certificate(Bundle.open(worse_bundle)) is None

    def test_texts_are_not_classified(self, words: list[object]) -> None:
        with pytest.raises(InputError, match="only pictures are classified"):
            self.run(*words, "--query", "text")


def _quick(folder: Path) -> Path:
    path = folder / "workload.yaml"
    path.write_text(
        "name: test\ndescription: hardly anything\nbatch_sizes: [1]\nmin_warmup_runs: 1\n"
        "max_warmup_seconds: 0.1\nrepeats: 3\nseconds_per_batch: 0.1\ncold_starts: 0\n"
    )
    return path


def _one(
    asker: Encoder,
    indexer: Encoder,
    query: Tower,
    gallery: Any,
    test: Any,
    number: int,
    views: int,
) -> Similarities:
    """Cosines of one query with the gallery's other sides and its own, which comes last."""
    from edgeclip.runtime.cascade.scores import embed_views
    from edgeclip.runtime.inputs.preprocess import crop_batch

    pairs = [*(gallery[i] for i in range(len(gallery))), test[number]]
    seen = None
    if query == "image":
        entries = indexer.encode_text([str(pair.caption) for pair in pairs])
        pixels = crop_batch([test[number].image], asker.spec.image)
        asked = asker.encode_pixels(pixels)
        seen = embed_views(asker.encode_pixels, pixels, views)
    else:
        entries = indexer.encode_image([pair.image for pair in pairs])
        asked = asker.encode_text(str(test[number].caption))
    return Similarities.between(asked, entries, seen)


def _own_is_best(found: Similarities) -> bool:
    return bool(found.cosines[0, -1] > found.cosines[0, :-1].max() + 1e-7)


BOUND, DELTA = 0.95, 0.05


def planted(rng: np.random.Generator, count: int, *, wrong_below: float) -> PairedOutcomes:
    """Outcomes with uniform scores; the teacher is right in 90%.

    The student is right with it, but in a part of the queries that it scores below
    `wrong_below`. So a cascade keeps 1 - (wrong_below - threshold) / 2 of the teacher's quality.
    """
    scores = rng.random(count)
    teacher = rng.random(count) < 0.9
    student = teacher & ((scores >= wrong_below) | (rng.random(count) < 0.5))
    return PairedOutcomes(scores=scores, student=student, escalated=teacher, teacher=teacher)


GRID = (ESCALATE_ALL, *(1 - np.arange(1, 40) / 40), ESCALATE_NONE)


class TestFixedSequence:
    def test_stops_at_the_first_that_is_not_rejected(self) -> None:
        assert fixed_sequence_test([0.01, 0.05, 0.06, 0.0], 0.05) == 2
        assert fixed_sequence_test([0.5, 0.0], 0.05) == 0
        assert fixed_sequence_test([], 0.05) == 0

    def test_wrong_certificates_are_rare(self) -> None:
        """The chosen threshold keeps less than promised in at most delta of the runs."""
        wrong_below = 0.3
        # A threshold t keeps 1 - (0.3 - t) / 2: below t = 0.2 that is less than 95%.
        wrong = certified = 0
        for seed in range(1000):
            outcomes = planted(np.random.default_rng(seed), 400, wrong_below=wrong_below)
            found = choose_threshold(outcomes, GRID, bound=BOUND, delta=DELTA)
            if found is not None:
                certified += 1
                wrong += found.threshold < 0.2 - 1e-9
        assert wrong <= DELTA * 1000
        assert certified >= 0.99 * 1000

    def test_a_student_just_below_the_bound_is_rarely_trusted(self) -> None:
        wrong = 0
        for seed in range(1000):
            rng = np.random.default_rng(seed)
            teacher = rng.random(600) < 0.9
            student = teacher & (rng.random(600) < 0.949)
            outcomes = PairedOutcomes(
                scores=rng.random(600), student=student, escalated=teacher, teacher=teacher
            )
            found = choose_threshold(
                outcomes, (ESCALATE_ALL, ESCALATE_NONE), bound=BOUND, delta=DELTA
            )
            assert found is not None  # everything escalated is as good as the teacher
            wrong += found.threshold == ESCALATE_NONE
        assert 0 < wrong <= DELTA * 1000

    def test_power_where_quality_is_above(self) -> None:
        """With 2,000 queries the threshold is at most 0.07 more cautious than it need be."""
        found = [
            choose_threshold(
                planted(np.random.default_rng(seed), 2000, wrong_below=0.3),
                GRID,
                bound=BOUND,
                delta=DELTA,
            )
            for seed in range(60)
        ]
        chosen = np.array([item.threshold for item in found if item is not None])
        assert len(chosen) == 60
        assert np.median(chosen) <= 0.25
        assert (chosen <= 0.27 + 1e-9).mean() >= 0.9

    def test_a_student_as_good_as_its_teacher_escalates_nothing(self) -> None:
        rng = np.random.default_rng(0)
        teacher = rng.random(500) < 0.9
        outcomes = PairedOutcomes(
            scores=rng.random(500), student=teacher, escalated=teacher, teacher=teacher
        )
        found = choose_threshold(outcomes, GRID, bound=BOUND, delta=DELTA)
        assert found is not None
        assert found.threshold == ESCALATE_NONE
        assert found.certified == len(GRID)

    def test_too_few_queries_certify_nothing(self) -> None:
        outcomes = planted(np.random.default_rng(0), 20, wrong_below=0.3)
        assert choose_threshold(outcomes, GRID, bound=BOUND, delta=DELTA) is None

    def test_is_deterministic(self) -> None:
        outcomes = planted(np.random.default_rng(3), 500, wrong_below=0.3)
        first = choose_threshold(outcomes, GRID, bound=BOUND, delta=DELTA)
        assert first == choose_threshold(outcomes, GRID, bound=BOUND, delta=DELTA)


def test_watched_shares_hold_all_at_once() -> None:
    missed = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        watched = watched_shares(rng.random(100), rng.random(300))
        assert len(watched) == 3
        missed += not all(mark.share.low <= mark.below <= mark.share.high for mark in watched)
    assert missed <= 4


def test_what_is_never_answered_alone_has_no_disagreement() -> None:
    outcomes = planted(np.random.default_rng(0), 50, wrong_below=0.3)
    assert disagreement(outcomes, 0.5, 10) is None  # nobody looked
    looked = dataclasses.replace(outcomes, agree=outcomes.student == outcomes.teacher)
    assert disagreement(looked, ESCALATE_ALL, 10) is None
    found = disagreement(looked, 0.0, 10)
    assert found is not None
    assert found.high > found.value > 0


def test_scores_that_are_all_alike_have_one_mark() -> None:
    (mark,) = watched_shares(np.ones(10), np.ones(20))
    assert (mark.below, mark.share.value) == (1.0, 0.0)


class TestClusters:
    def test_copies_are_one_observation(self) -> None:
        """Every outcome five times certifies what the outcomes alone do, and no more."""
        alone = planted(np.random.default_rng(5), 500, wrong_below=0.3)
        five = np.repeat(np.arange(500), 5)
        copied = PairedOutcomes(
            scores=alone.scores[five],
            student=alone.student[five],
            escalated=alone.escalated[five],
            teacher=alone.teacher[five],
            clusters=five,
        )
        expected = choose_threshold(alone, GRID, bound=BOUND, delta=DELTA)
        found = choose_threshold(copied, GRID, bound=BOUND, delta=DELTA)
        assert expected is not None
        assert found is not None
        assert (found.threshold, found.certified) == (expected.threshold, expected.certified)

    def test_the_order_of_bets_is_that_of_the_ledger(self) -> None:
        outcomes = planted(np.random.default_rng(3), 400, wrong_below=0.3)
        turned = choose_threshold(
            outcomes, GRID, bound=BOUND, delta=DELTA, order=tuple(range(399, -1, -1))
        )
        back = PairedOutcomes(
            scores=outcomes.scores[::-1],
            student=outcomes.student[::-1],
            escalated=outcomes.escalated[::-1],
            teacher=outcomes.teacher[::-1],
        )
        assert turned == choose_threshold(back, GRID, bound=BOUND, delta=DELTA)

    def test_by_embedding_copies_are_found(self, cascade_plan: CascadePlan) -> None:
        made = certify(dataclasses.replace(cascade_plan, cluster_by="embedding"))
        clusters = made.outcomes.clusters  # flat pictures of one colour are the same to any teacher
        assert clusters is not None
        assert len(np.unique(clusters)) < COUNTS["test"]

    def test_by_folder_three_colours_are_three_observations(
        self, cascade_plan: CascadePlan
    ) -> None:
        found = certify(dataclasses.replace(cascade_plan, cluster_by="folder"))
        assert found.certificate is None

    def test_one_cluster_is_refused(self, cascade_plan: CascadePlan, tmp_path: Path) -> None:
        for part in COUNTS:
            for name in ("red", "blue"):
                path = tmp_path / part / name / "1.png"
                path.parent.mkdir(parents=True)
                Image.new("RGB", (10, 10), "red").save(path)
        same = dataclasses.replace(
            cascade_plan,
            eval_set=zero_shot_eval_set(str(tmp_path), size=8),
            cluster_by="embedding",
        )
        with pytest.raises(InputError, match="they are one observation"):
            certify(same)


class TestTries:
    def test_each_further_hypothesis_has_a_smaller_part(
        self, cascade_plan: CascadePlan, tmp_path: Path
    ) -> None:
        plan = dataclasses.replace(cascade_plan, ledger=tmp_path / "ledger.json")
        first, again = certify(plan), certify(plan)
        assert (first.turn.number, first.tested_at) == (1, 0.025)
        assert (again.turn.number, again.tested_at) == (1, 0.025)
        assert first.certificate is not None
        assert again.certificate is not None
        assert first.certificate.threshold == again.certificate.threshold
        assert first.certificate.tested_at == 0.025
        other = certify(dataclasses.replace(plan, bound=0.9))
        assert other.turn.number == 2
        assert other.tested_at == pytest.approx(0.05 / 6)

    @pytest.mark.parametrize(("part", "number"), [("test", 1), ("calibration", 2)])
    def test_more_pictures_continue_it_in_the_test_part_alone(
        self, cascade_plan: CascadePlan, colours: Path, tmp_path: Path, part: str, number: int
    ) -> None:
        grown = shutil.copytree(colours, tmp_path / "grown")
        plan = dataclasses.replace(
            cascade_plan,
            eval_set=zero_shot_eval_set(str(grown), size=8),
            ledger=tmp_path / "ledger.json",
        )
        assert certify(plan).turn.number == 1
        Image.new("RGB", (10, 10), "red").save(grown / part / "red" / "more.png")
        more = dataclasses.replace(plan, eval_set=zero_shot_eval_set(str(grown), size=8))
        assert certify(more).turn.number == number


class TestTrial:
    def test_unsure_goes_to_the_teacher(self) -> None:
        scores = np.array([0.1, 0.5, 0.9, np.nan])
        assert needs_teacher(scores, 0.5).tolist() == [True, False, False, True]
        outcomes = PairedOutcomes(
            scores=scores,
            student=np.array([False, False, True, False]),
            escalated=np.array([True, True, False, True]),
            teacher=np.array([True, False, False, True]),
        )
        assert outcomes.correct(0.5).tolist() == [True, False, True, True]
        assert outcomes.escalated_share(0.5) == 0.5
        assert outcomes.surplus(0.5, 0.95) == pytest.approx([0.05, 0.0, 1.0, 0.05])
        assert outcomes.correct(ESCALATE_ALL).tolist() == outcomes.escalated.tolist()

    def test_arrays_that_do_not_fit_are_refused(self) -> None:
        flags = np.ones(3, dtype=np.bool_)
        with pytest.raises(InputError, match="one score"):
            PairedOutcomes(scores=np.zeros(2), student=flags, escalated=flags, teacher=flags)

    @given(st.lists(st.floats(-1, 2), min_size=1, max_size=40))
    def test_grid_descends_between_all_and_none(self, scores: list[float]) -> None:
        grid = threshold_grid(np.array(scores))
        assert grid[0] == ESCALATE_ALL
        assert grid[-1] == ESCALATE_NONE
        assert list(grid) == sorted(set(grid), reverse=True)

    def test_grid_needs_finite_scores(self) -> None:
        for wrong in (np.array([]), np.array([0.1, np.nan])):
            with pytest.raises(InputError, match="calibration scores"):
                threshold_grid(wrong)
