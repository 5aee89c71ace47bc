"""Plans explained in words, as a table and as a picture."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from edgeclip.profiles.cuts.plan_report import explain, plan_chart, plan_page, plan_table
from edgeclip.profiles.report.drawing import svg
from edgeclip.profiles.report.write_page import markdown_of
from edgeclip.runtime.planning.choose_plan import Objective, choose_plan
from edgeclip.runtime.planning.cut_set import CutSet
from edgeclip.runtime.planning.stage_times import StageTimes
from tests.runtime.planning.made_up_times import FAST, SLOW, chosen, estimates


def test_a_reason_is_given_for_what_is_chosen(emoji_cuts: CutSet, emoji_times: StageTimes) -> None:
    sent = chosen(estimates(emoji_cuts, emoji_times, FAST, slower=20.0))
    words = explain(sent, Objective())
    assert "No cut in the middle wins" in words
    assert "a tower of constant width carries as many values" in words
    kept = chosen(estimates(emoji_cuts, emoji_times, SLOW))
    assert "No cut in the middle wins" in explain(kept, Objective())


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Objective(deadline_ms=0.5), "No plan keeps the deadline"),
        (Objective(ms_per_joule=1e6), "Energy was not measured"),
    ],
)
def test_what_cannot_be_had_is_said(
    emoji_cuts: CutSet, emoji_times: StageTimes, objective: Objective, words: str
) -> None:
    found = estimates(emoji_cuts, emoji_times, FAST, slower=20.0)
    assert words in explain(choose_plan(list(found.values()), objective), objective)


def test_table_and_picture_show_every_kind(
    emoji_cuts: CutSet, emoji_times: StageTimes, tmp_path: Path
) -> None:
    choice = chosen(estimates(emoji_cuts, emoji_times, SLOW, utilisation=0.3), deadline_ms=90.0)
    table = plan_table(choice)
    lines = table.splitlines()
    assert lines[0].split()[:5] == ["plan", "p50", "ms", "p95", "ms"]
    assert sum(line.startswith(">") for line in lines) == 1
    assert "more with --all" in table
    assert len(plan_table(choice, all_codecs=True).splitlines()) > len(lines)
    chart = plan_chart(choice, title="Plans <over> a link", deadline_ms=90.0)
    root = ElementTree.fromstring(svg(chart, alone=True))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"device only", "Plans <over> a link", "milliseconds"} & texts
    assert {"on the server", "round trip", "wait for the server"} <= texts
    page = markdown_of(plan_page(chart, choice, words="one <two>\nthree"))
    assert "one &lt;two&gt;" in page
    assert "three" in page
