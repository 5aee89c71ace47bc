"""Students that read bytes, and students whose token embeddings share a matrix."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.rebuild import token_table
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import embed_source
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import FAMILIES

SMALL = StudentShape(image_heads=1, image_layers=2, text_heads=1, text_layers=1)
BYTES = replace(SMALL, text_tokenizer="bytes")
TEXTS = ("two red cars", "zwei rote Autos", "赤い車が二台", "", "a\u0301 🙂")


def embedded(dual: DualEncoder, texts: tuple[str, ...] = TEXTS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = dual.embed_text(dual.tokenize(texts))
    return found


@pytest.fixture(scope="module")
def student(teacher: DualEncoder) -> DualEncoder:
    return new_student(teacher, BYTES)


@given(text=st.text(max_size=12))
def test_every_text_is_its_bytes(student: DualEncoder, text: str) -> None:
    ids = student.tokenizer(text, add_special_tokens=False)["input_ids"]
    normalised = student.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert len(ids) == len(normalised.encode())
    assert student.tokenizer.decode(ids) == normalised


def test_a_student_of_bytes_shares_the_space_and_survives_saving(
    teacher: DualEncoder, student: DualEncoder, tmp_path: Path
) -> None:
    spec = student.spec.text
    assert (spec.vocab_size, spec.context_length) == (259, 4 * teacher.spec.text.context_length)
    assert student.space == teacher.space
    assert student.weight_bytes < new_student(teacher, SMALL).weight_bytes
    # A letter begins with the vector that it had as a token of the teacher's.
    tables = [own.model.get_parameter(token_table(own)) for own in (student, teacher)]
    numbers = [own.tokenizer.convert_tokens_to_ids("q") for own in (student, teacher)]
    assert torch.equal(tables[0][numbers[0]], tables[1][numbers[1]][:32])
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert (loaded.space, loaded.spec) == (teacher.space, student.spec)
    assert torch.equal(embedded(loaded), embedded(student))


def test_a_factorised_table_of_nearly_full_rank_changes_nearly_nothing(
    teacher: DualEncoder, tmp_path: Path
) -> None:
    whole = new_student(teacher, SMALL)
    width = 32
    near = new_student(teacher, replace(SMALL, token_rank=width - 1))
    far = new_student(teacher, replace(SMALL, token_rank=4))
    errors = [(embedded(own) - embedded(whole)).norm() for own in (near, far)]
    assert 0 < errors[0] < errors[1]
    saved = whole.spec.text.vocab_size * (width - 4) - 4 * width
    assert whole.weight_bytes - far.weight_bytes == 4 * saved
    far.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == teacher.space
    assert torch.equal(embedded(loaded), embedded(far))


def test_a_pruned_vocabulary_comes_before_the_factorisation(
    teacher: DualEncoder, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("two red cars\n", encoding="utf-8")
    pruned = new_student(teacher, replace(SMALL, vocabulary=str(texts)))
    assert pruned.spec.text.vocab_size < teacher.spec.text.vocab_size
    both = new_student(teacher, replace(SMALL, vocabulary=str(texts), token_rank=4))
    assert both.spec == pruned.spec
    plain = new_student(teacher, SMALL)
    assert torch.equal(embedded(pruned, TEXTS[:1]), embedded(plain, TEXTS[:1]))


def test_what_does_not_go_together_is_refused(teacher: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="not with bytes"):
        new_student(teacher, replace(BYTES, vocabulary="texts.txt"))
    with pytest.raises(ConfigError, match="from 1 to 31"):
        new_student(teacher, replace(SMALL, token_rank=32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["siglip", "chinese_clip", "altclip", "metaclip_2", "vit_and_bert", "dinov2_and_clip"]
)
def test_every_family_has_students_of_bytes(name: str, tmp_path: Path) -> None:
    teacher = DualEncoder.load(FAMILIES[name](tmp_path / name).folder)
    shape = StudentShape(
        image_heads=1,
        image_layers=2,
        text_heads=1,
        text_layers=1,
        text_tokenizer="bytes",
        token_rank=8,
        merge_after=(1,),
    )
    student = new_student(teacher, shape)
    assert student.spec.text.context_length == 4 * teacher.spec.text.context_length
    student.save(tmp_path / "student")
    loaded = DualEncoder.load(tmp_path / "student")
    assert loaded.space == teacher.space != space_fingerprint(loaded)
    source = EmojiSource("test", 5, size=32)
    for ours, theirs in zip(
        embed_source(loaded, source), embed_source(student, source), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert (ours[1:] - ours[0]).abs().max() > 1e-4
    student.train()
    student.embed_text(student.tokenize(TEXTS))[:, 0].sum().backward()
    trained = [
        weight
        for key, weight in student.named_parameters()
        if key.startswith(student.tower_parts("text")) and weight.requires_grad
    ]
    assert all(weight.grad is not None for weight in trained)
