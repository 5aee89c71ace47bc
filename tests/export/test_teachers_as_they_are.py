"""A teacher of each family, exported as it is to a verified bundle, as a person does it."""

from pathlib import Path

import pytest

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.cli.main import main
from tests.compress.teachers.teacher_factory import FAMILIES
from tests.export.test_teacher_roads import ELSEWHERE, bundle_answers_as

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_teacher_is_exported_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, bundle = FAMILIES[name](tmp_path / name).folder, tmp_path / "bundle"
    status = main(["export", str(teacher), "--own-space", "--out", str(bundle), *ELSEWHERE])
    assert status == 0, capsys.readouterr().err
    assert main(["verify", str(bundle)]) == 0, capsys.readouterr()
    bundle_answers_as(bundle, DualEncoder.load(teacher))
