import dataclasses
from typing import Any

import pytest

from edgeclip.profiles.report.profile_data import NamedRun
from edgeclip.profiles.report.profile_report import profile_summary_page
from edgeclip.profiles.report.sections import AdviceNote, code_parts
from edgeclip.profiles.report.write_page import escaped, markdown_of
from tests.profiles.report.profile_factory import (
    advice,
    disturbed_run,
    quality,
    quiet_run,
    two_runs,
)


def short(runs: tuple[NamedRun, ...], **more: Any) -> str:
    return markdown_of(profile_summary_page(runs, **more))


def test_warnings_come_before_the_table_and_the_environment_is_folded() -> None:
    text = short(two_runs(), quality=quality(), advice=advice())
    warning, table, folded = (
        text.index(words) for words in ("> [!WARNING]", "| subject |", "<details>")
    )
    assert warning < table < folded
    assert "laptop: DISTURBED while it was measured" in text
    assert "laptop: THROTTLED" in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_every_subject_has_a_row_with_its_intervals() -> None:
    runs = two_runs()
    lines = short(runs, quality=quality()).splitlines()
    rows = [line for line in lines if line.startswith("| student") or line.startswith("| teacher")]
    assert len(rows) == sum(len(one.run.measurements) for one in runs)
    columns = {line.count(" | ") for line in rows}
    assert columns == {6}
    (int8,) = (row for row in rows if row.startswith("| student int8 · epyc | image tower"))
    cells = int8.split(" | ")
    for cell in cells[2:6]:
        assert "<br><sub>" in cell
        assert " to " in cell
    assert cells[6].startswith("-0.35 points")
    contended = [row for row in rows if "⚠" in row]
    assert contended
    assert all("laptop" in row for row in contended)


def test_a_quiet_run_has_no_warning_and_no_empty_column() -> None:
    run = quiet_run()
    items = tuple(dataclasses.replace(item, scenarios=()) for item in run.measurements)
    text = short((NamedRun(name="epyc", run=dataclasses.replace(run, measurements=items)),))
    assert "[!" not in text
    assert "quality" not in text
    assert "| student int8 |" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("a|b\nc", "a\\|b c"),
        ("`x` *y* [z](u)", "\\`x\\` \\*y\\* \\[z\\](u)"),
        ("thanks @someone", "thanks @<!-- -->someone"),
        ("R@1", "R@1"),
        ("fixes #12", "fixes #<!-- -->12"),
        ("https://example.org", "https<!-- -->://example.org"),
    ],
)
def test_text_from_files_stays_text(given: str, shown: str) -> None:
    assert escaped(given) == shown


def test_commands_in_advice_stay_code() -> None:
    note = AdviceNote(
        subject="image int8", title="Run `edgeclip embed --batch-size 4` or *wait*", text=""
    )
    text = short((NamedRun(name="epyc", run=quiet_run()),), advice=(note,))
    assert "- **Run `edgeclip embed --batch-size 4` or \\*wait\\*** (image int8)" in text
    assert code_parts("a ` lone `b` tick") == [(False, "a ` lone `b` tick")]


def test_a_hostile_name_makes_no_markup() -> None:
    name = "<script>alert(1)</script>|@team\n# heading"
    run = disturbed_run()
    items = tuple(
        dataclasses.replace(item, name=f"{name}{at}") for at, item in enumerate(run.measurements)
    )
    run = dataclasses.replace(run, measurements=items, command="echo ````\n</details>")
    text = short((NamedRun(name=name, run=run),))
    assert "<script" not in text
    assert "@team" not in text
    assert "\n# heading" not in text
    assert "`````\necho ````" in text  # the fence is longer than what it holds
