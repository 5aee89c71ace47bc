from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from edgeclip.compress.data.mixture import parts_of
from edgeclip.compress.data.sampling import Sampling
from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache
from edgeclip.compress.train.distill import DistillationBatches, distill
from edgeclip.compress.train.loss_terms import Bank
from edgeclip.compress.train.losses import TERMS, LossWeights
from edgeclip.compress.train.text_bank import BankReader, BankRows, TextBank
from edgeclip.compress.train.train_loop import BatchPart, TrainSettings, read_log
from edgeclip.runtime.errors import ConfigError

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
    return build_cache(teacher, source, tmp_path_factory.mktemp("cache") / "cache", workers=0)


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
    batches = DistillationBatches(teacher, [cache], source, sampling, SETTINGS, reader)
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


ALL = LossWeights(**dict.fromkeys(set(TERMS) - {"sigmoid"}, 1.0), bank=9, row_focus=1.0)


@pytest.mark.slow
def test_a_run_with_every_loss_resumes_exactly(
    teacher: DualEncoder, cache: TeacherCache, source: FolderSource, tmp_path: Path
) -> None:
    def run(out: Path, settings: TrainSettings) -> DualEncoder:
        student = new_student(teacher, SMALL)
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
    assert set(TERMS) - {"sigmoid"} <= set(logs[1][0])
    # The losses of a batch in parts are those of the whole.
    run(tmp_path / "four", replace(constant, steps=1, accumulate=4))
    (line,) = read_log(tmp_path / "four" / "log.jsonl")
    for name in ALL.__slots__:
        if name in line:
            assert line[name] == pytest.approx(logs[1][0][name], rel=1e-4), name


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
