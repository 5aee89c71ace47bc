import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.data.translations import Translated
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.batch_losses import batch_losses, embed_batch, most_learnable
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.distillation_batches import DistillationBatches
from edgeclip.compress.train.loss_terms import Bank, patch_loss
from edgeclip.compress.train.losses import TERMS, LossWeights
from edgeclip.compress.train.text_bank import BankReader, BankRows, TextBank
from edgeclip.compress.train.train_loop import BatchPart, TrainSettings, read_log
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import FAMILIES

SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
SETTINGS = TrainSettings(steps=4, batch_size=4, warmup_steps=1, compute="fp32", workers=0)


@pytest.fixture(scope="module")
def source(few_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """20 pictures: number 5 has no caption, and numbers 7 and 11 have the same."""
    folder = tmp_path_factory.mktemp("bank") / "pictures"
    folder.mkdir()
    for number in range(20):
        name = f"{number:04d}"
        (folder / f"{name}.bmp").write_bytes((few_pictures / f"{name}.bmp").read_bytes())
        if number != 5:
            (folder / f"{name}.txt").write_text(f"picture {7 if number == 11 else number}")
    return FolderSource(folder)


@pytest.fixture(scope="module")
def cache(
    teacher: DualEncoder, source: FolderSource, tmp_path_factory: pytest.TempPathFactory
) -> TeacherCache:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    plain = build_cache(teacher, source, folder, workers=0, views=2)
    assert not plain.has_patches
    return build_cache(teacher, source, folder, workers=0, patches=True)


def _bank(batches: DistillationBatches, bank: TextBank, step: int, parts: int = 1) -> Bank:
    every = [batches(BatchPart(step, number, parts)).targets for number in range(parts)]
    rows = {name: torch.cat([own[name] for own in every]) for name in every[0]}
    new = BankRows([rows["bank 0"]], rows["bank key"])
    return bank.after(int(rows["bank position"][0]), new, rows["text number"])


@pytest.mark.parametrize("size", [3, 4, 10])
def test_a_bank_holds_the_captions_that_come_next(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, size: int
) -> None:
    sampling = Sampling(parts_of(source), held_out=3)
    reader = BankReader([cache], sampling, size)
    batches = DistillationBatches(teacher, [cache], source, sampling, SETTINGS, bank=reader)
    whole, in_parts = (TextBank(reader, torch.device("cpu")) for _ in range(2))
    for step in range(7):
        found = _bank(batches, whole, step)
        indices = sampling.items(4 * (step + 1), size)[0].tolist()
        assert not set(indices) & set(sampling.held_out.tolist())
        there = [index for index in indices if index != 5]
        wanted = normalize(torch.from_numpy(cache.text(there).astype(np.float32)), dim=-1)
        shown = [sampling.items(4 * step, 4)[0].tolist(), there]
        captions = [[source.caption(index) for index in own] for own in shown]
        same = [[a == b is not None for b in captions[1]] for a in captions[0]]
        # Where a caption lies in the bank does not matter.
        order = found.texts[0][:, 0].argsort()
        sorted_ = wanted[:, 0].argsort()
        torch.testing.assert_close(found.texts[0][order], wanted[sorted_])
        assert torch.equal(found.same[:, order], torch.tensor(same)[:, sorted_])
        # A bank that begins at this step, and one that came here in two parts a batch.
        for other in (
            _bank(batches, TextBank(reader, torch.device("cpu")), step),
            _bank(batches, in_parts, step, 2),
        ):
            assert torch.equal(other.texts[0], found.texts[0])
            assert torch.equal(other.same, found.same)


OTHERS = set(TERMS) - {"sigmoid"}  # which wants a SigLIP
ONES: dict[str, Any] = dict.fromkeys(OTHERS, 1.0)
ALL = LossWeights(**ONES, bank=9, row_focus=1.0)


@pytest.mark.slow
def test_a_run_with_every_loss_resumes_exactly(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    def run(out: Path, settings: TrainSettings) -> DualEncoder:
        student = new_student(teacher, replace(SMALL, patch_size=16))
        distill(student, cache, source, loss_weights=ALL, settings=settings, out=out)
        return student

    constant = replace(SETTINGS, schedule="constant")
    whole = run(tmp_path / "whole", constant)
    run(tmp_path / "parts", replace(constant, steps=2))
    resumed = run(tmp_path / "parts", constant)
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("parts", "whole")]
    assert [line["total"] for line in logs[0]] == [line["total"] for line in logs[1]]
    assert set(logs[1][0]) >= OTHERS
    resumed.save(tmp_path / "student")  # without the map of the patches
    assert space_fingerprint(DualEncoder.load(tmp_path / "student")) == space_fingerprint(whole)
    # The losses of a batch in parts are those of the whole.
    run(tmp_path / "four", replace(constant, steps=1, accumulate=4))
    (line,) = read_log(tmp_path / "four" / "log.jsonl")
    for name in ALL.__slots__:
        if name in line:
            assert line[name] == pytest.approx(logs[1][0][name], rel=1e-4), name


def test_translations_of_one_caption_are_no_negatives(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    # Pictures 7 and 11 have the same caption; 7 leaves 1 of 3, and 11 leaves 2.
    other = Translated(source, {"picture 7": ("a picture", "ein Bild")})
    assert other.caption(7) != other.caption(11)
    sampling = Sampling(parts_of(source), held_out=0)
    settings = replace(SETTINGS, batch_size=20)
    found, losses = None, []
    for own in (source, other):
        batch = DistillationBatches(teacher, [cache], own, sampling, settings)(BatchPart(0, 0, 1))
        if found is None:
            with torch.inference_mode():
                found = embed_batch(teacher, batch.inputs)
        weights = LossWeights(contrastive=1)
        losses.append(batch_losses(weights, [cache.settings], None, (), found, batch.targets))
    assert losses[0] == losses[1]


def test_patches_are_those_of_the_teacher(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    sampling = Sampling(parts_of(source), held_out=0)
    settings = replace(SETTINGS, batch_size=12)
    whole = DistillationBatches(teacher, [cache], source, sampling, settings, patches=16)
    batch = whole(BatchPart(1, 0, 1))  # crosses from view 0 to view 1
    with torch.inference_mode():
        image, patches = teacher.embed_image_and_patches(teacher.normalise(batch.inputs["pixels"]))
    assert (image * batch.targets["image 0"]).sum(dim=1).min() > 0.999
    theirs = batch.targets["patches"].float()
    assert patch_loss(patches - patches.mean(dim=-1, keepdim=True), theirs).item() < 1e-3
    # A coarser grid: each patch of 2 x 2 is near the mean of four.
    coarse = DistillationBatches(teacher, [cache], source, sampling, settings, patches=4)
    found = coarse(BatchPart(1, 0, 1)).targets["patches"].float()
    means = theirs.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
    assert found.shape == means.shape
    assert patch_loss(found, means) < 0.1


def test_a_masked_picture_hides_its_share_in_the_mean_colour(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    sampling = Sampling(parts_of(source), held_out=0)
    batches = DistillationBatches(teacher, [cache], source, sampling, SETTINGS, hide=0.75)
    hidden = batches(BatchPart(3, 0, 1)).inputs["hidden"]
    assert hidden.flatten(1).sum(dim=1).tolist() == [48] * 4
    halves = [batches(BatchPart(3, number, 2)).inputs["hidden"] for number in range(2)]
    assert torch.equal(torch.cat(halves), hidden)
    assert not torch.equal(batches(BatchPart(4, 0, 1)).inputs["hidden"], hidden)
    pixels = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    every = {"pixels": pixels, "hidden": torch.ones(1, 8, 8, dtype=torch.bool)}
    with torch.inference_mode():
        found = embed_batch(teacher, every)["masked"]
        torch.testing.assert_close(found, teacher.embed_image(torch.zeros(1, 3, 32, 32)))


def test_known_pairs_are_chosen_by_the_cache(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource
) -> None:
    sampling = Sampling(parts_of(source), held_out=3)
    batches = DistillationBatches(
        teacher, [cache], source, sampling, SETTINGS, selection="known", candidates=3
    )
    for step in range(3):
        indices, epochs = batches.items(BatchPart(step, 0, 1))
        every, passes = sampling.items(12 * step, 12)
        for number in range(4):
            own = slice(3 * number, 3 * number + 3)
            scores = []
            for index, epoch in zip(every[own].tolist(), passes[own].tolist(), strict=True):
                if not source.captions(index):
                    scores.append(-2.0)
                    continue
                image, text = cache.image([index], [epoch % 2]), cache.text([index])
                scores.append(float(image.astype(np.float32)[0] @ text.astype(np.float32)[0]))
            best = int(np.argmax(scores))
            assert indices[number] == every[own][best]
            assert epochs[number] == passes[own][best]
        halves = [batches.items(BatchPart(step, number, 2))[0] for number in range(2)]
        assert np.concatenate(halves).tolist() == indices.tolist()
        assert batches(BatchPart(step, 0, 1)).inputs["pixels"].shape[0] == 4


def test_the_pair_that_the_student_has_most_to_learn_of() -> None:
    # The teacher's cosines are 1, .6, 1 and 0; the student's .8, 0, 1 and -1, and the last has no
    # caption. So .2 and .6 are to be learned of the first two, and 0 of the third.
    theirs = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    ours = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    right = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    targets = {
        "image 0": theirs,
        "text 0": right,
        "captioned": torch.tensor([True, True, True, False]),
    }
    assert most_learnable(2, {"image": ours, "text": right}, targets).tolist() == [1, 2]


@pytest.mark.slow
def test_a_run_that_chooses_its_pairs_resumes_exactly(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    weights = LossWeights(selection="learnable", candidates=2)

    def run(name: str, settings: TrainSettings) -> dict[str, torch.Tensor]:
        student = new_student(teacher, SMALL)
        out = tmp_path / name
        distill(student, cache, source, loss_weights=weights, settings=settings, out=out)
        return dict(student.state_dict())

    constant = replace(SETTINGS, schedule="constant")
    whole = run("whole", constant)
    run("parts", replace(constant, steps=2))
    resumed = run("parts", constant)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    run("two", replace(constant, steps=1, accumulate=2))
    lines = [read_log(tmp_path / name / "log.jsonl")[0] for name in ("whole", "two")]
    assert lines[1]["total"] == pytest.approx(lines[0]["total"], rel=1e-4)


@pytest.mark.slow
def test_a_siglip_teaches_with_its_bias(source: FolderSource, tmp_path: Path) -> None:
    siglip = DualEncoder.load(FAMILIES["siglip"](tmp_path / "teacher").folder)
    folder = tmp_path / "cache"
    before = build_cache(siglip, source, folder, workers=0).settings
    assert before.logit_bias == siglip.logit_bias is not None
    # A cache from before the bias was kept in it.
    identity = json.loads((folder / "cache.json").read_text())
    del identity["logit_bias"]
    (folder / "cache.json").write_text(json.dumps(identity))
    cache = build_cache(siglip, source, folder, workers=0)
    assert cache.settings == before
    weights = LossWeights(sigmoid=1, logits=1, bank=5)
    student = new_student(siglip, StudentShape(image_layers=1, text_layers=1))
    one = replace(SETTINGS, steps=1)
    distill(student, cache, source, loss_weights=weights, settings=one, out=tmp_path / "run")
    (line,) = read_log(tmp_path / "run" / "log.jsonl")
    assert line["sigmoid"] > line["logits"] > 0


def test_patches_need_a_cache_of_them(
    teacher: DualEncoder, source: FolderSource, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="opened with patches"):
        distill(
            new_student(teacher, SMALL),
            build_cache(teacher, source, tmp_path / "cache", workers=0),
            source,
            loss_weights=LossWeights(patches=1),
            settings=SETTINGS,
            out=tmp_path / "run",
        )


def test_a_bank_that_no_caption_is_left_for(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="a batch of 20 leaves none of 18 captions"):
        distill(
            new_student(teacher, SMALL),
            cache,
            source,
            loss_weights=LossWeights(bank=4),
            settings=replace(SETTINGS, batch_size=20),
            out=tmp_path / "run",
        )
