"""A recipe whose trials take a second each."""

from pathlib import Path

import pytest

from edgeclip.compress.train.recipe import DistillRecipe


@pytest.fixture(scope="session")
def one_step(teacher_folder: Path) -> DistillRecipe:
    """One step on 16 scenes with the tiny teacher, which finds one of three pairs by chance."""
    settings = {
        "teacher": [str(teacher_folder)],
        "count": 16,
        "held_out": 4,
        "steps": 1,
        "batch_size": 4,
        "warmup_steps": 0,
        "workers": 0,
    }
    return DistillRecipe().replaced(settings, source="the test")
