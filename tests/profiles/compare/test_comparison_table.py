import dataclasses
import re

import numpy as np
import pytest

from edgeclip.profiles.compare.compare_runs import Comparison, compare_runs
from edgeclip.profiles.compare.regression_gate import (
    comparison_markdown,
    comparison_text,
    regression_gate,
    summary,
)
from tests.profiles.run_cases import (
    MACHINE,
    compared,
    identity,
    measurement,
    processes,
    run_of,
    yardstick,
)


@pytest.fixture
def comparisons() -> tuple[Comparison, ...]:
    """int8 became slower, fp32 did not; numpy, threads and bundle differ."""
    rng = np.random.default_rng(0)
    now, baseline = (
        run_of(
            measurement("fp32", processes(rng, 8.0)),
            measurement(
                "int8",
                processes(rng, slow * 2.0),
                identity=identity(threads=threads, bundle="a|b" if threads == 4 else "b"),
            ),
            machine=dataclasses.replace(MACHINE, packages=(("numpy", numpy),)),
            yardstick=yardstick(processes(rng, 1.0)),
        )
        for slow, threads, numpy in ((1.4, 4, "2.4"), (1.0, 2, "2.3"))
    )
    return compare_runs(now, baseline)


def test_text_names_ratios_differences_and_verdict(comparisons: tuple[Comparison, ...]) -> None:
    lines = comparison_text(comparisons, regression_gate(comparisons, 0.05)).splitlines()
    assert re.match(r"subject +baseline ms +now ms +now / baseline +95% interval", lines[0])
    assert re.match(r"image fp32 .* passed$", lines[1])
    assert re.match(r"image int8 +2\.\d\d +2\.\d\d +1\.[34]\d\d .* regressed$", lines[2])
    text = "\n".join(lines[3:])
    assert "divided by the yardstick's in the same round" in text
    assert text.count("packages changed: numpy 2.3 -> numpy 2.4") == 1
    assert "image int8: threads changed: 2 -> 4" in text
    assert re.search(r"image fp32: passed, (slower|faster) by [\d.]+% at (most|least)", text)
    assert re.search(r"image int8: regressed, slower by [23]\d\.\d% at least", text)
    assert lines[-1] == "REGRESSED: 1 of 2 slower by more than 5%: image int8"


def test_text_without_a_gate_has_no_verdict(comparisons: tuple[Comparison, ...]) -> None:
    text = comparison_text(comparisons)
    assert "regressed" not in text.lower()
    assert "verdict" not in text


def test_markdown_is_one_whole_table(comparisons: tuple[Comparison, ...]) -> None:
    for verdict in (None, regression_gate(comparisons, 0.05)):
        page = comparison_markdown(comparisons, verdict)
        rows = [line for line in page.splitlines() if line.startswith("|")]
        assert len(rows) == 4
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
        assert "a\\|b" in page
        assert (page.splitlines()[0].startswith("**REGRESSED: 1 of 2")) is (verdict is not None)
    assert "❌ regressed" in rows[-1]


def test_runs_without_a_yardstick_and_with_one_process_say_so() -> None:
    alone = compared(np.random.default_rng(1), 1.0, count=1)
    text = comparison_text([alone])
    assert "without a yardstick in both runs" in text
    assert "image fp32: one process only, which tells nothing of others" in text
    assert "as judged" in text


def test_summaries() -> None:
    rng = np.random.default_rng(2)
    same, noisy = compared(rng, 1.0), compared(rng, 1.0, spread=0.3)
    assert summary(regression_gate([same], 0.05)) == "PASSED: none of 1 is slower by 5% or more"
    undecided = regression_gate([same, noisy], 0.05, not_measured=["text fp32"])
    assert summary(undecided) == (
        "UNDECIDED: cannot tell whether it is slower by more than 5%: image fp32; "
        "not measured: text fp32"
    )
    assert re.search(
        r"undecided, -\d+\.\d% to \+\d+\.\d%; too noisy: not even 50 processes",
        comparison_text([noisy], regression_gate([noisy], 0.05)),
    )
    missing = regression_gate([same], 0.05, not_measured=["text fp32"])
    assert summary(missing) == "UNDECIDED: not measured: text fp32"
