"""The map from a teacher's weights is learned, and a run that ended is not learned again."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.students.importance import measure_importance
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.learn_mapping import learn_mapping
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings, read_log
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

SHAPE = StudentShape(
    image_heads=1,
    image_layers=2,
    text_heads=1,
    text_layers=1,
    inherit="mapped",
    mapping_steps=8,
)
SETTINGS = TrainSettings(
    steps=1, batch_size=8, warmup_steps=0, learning_rate=0.01, compute="fp32", workers=0
)


def test_a_map_is_learned_once(teacher: DualEncoder, source: FolderSource, tmp_path: Path) -> None:
    importance = measure_importance(teacher, source, held_out=2)
    cache = build_cache(teacher, source, tmp_path / "cache")

    def learned(out: str, shape: StudentShape = SHAPE, start: str = "") -> DualEncoder:
        student = new_student(teacher, shape, importance=importance)
        learn_mapping(
            student,
            teacher,
            shape,
            importance,
            cache,
            source,
            loss_weights=LossWeights(),
            settings=SETTINGS,
            out=tmp_path / out,
            start=start,
            held_out=2,
        )
        return student

    begun = new_student(teacher, SHAPE, importance=importance)
    student = learned("run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert log[-1]["total"] < log[0]["total"]
    names = [name for name, _ in student.named_parameters()]
    assert names == [name for name, _ in begun.named_parameters()]
    with pytest.raises(ConfigError, match="other data, teacher or student"):
        learned("run", start="another student before")
    found = space_fingerprint(student)
    assert found != space_fingerprint(begun)
    assert space_fingerprint(learned("run")) == found
    assert read_log(tmp_path / "run" / "log.jsonl") == log
    assert space_fingerprint(learned("again")) == found
    learned("again", replace(SHAPE, mapping_steps=10))  # goes on from the checkpoint
    assert len(read_log(tmp_path / "again" / "log.jsonl")) == 10
