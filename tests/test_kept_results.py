"""Kept figures belong to the repository as it is: to a commit, the kept weights and the bars."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "benchmarks"))
from _bars import bundle_hash, find_rule, model_hash  # noqa: E402

RESULTS = ROOT / "profiles" / "results"
BENCHMARKS = ROOT / "tests" / "benchmarks"
DOCUMENTS = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
DEMO = ("demo", "demo-measurements")  # written by `edgeclip demo`, together with its bundle
BUNDLE = "export/emoji_bundle/edgeclip.json"

_EARLIER_STUDENT = "of an earlier student"
# Results that are to be measured again, with the reason. Documents call them earlier.
AGAIN = {
    "cascade": _EARLIER_STUDENT,
    "drift": _EARLIER_STUDENT,
    "faults": _EARLIER_STUDENT,
    "fp16-islands": _EARLIER_STUDENT,
    "interop": _EARLIER_STUDENT,
    "loadgen_agreement": _EARLIER_STUDENT,
    "planner": "of an earlier student and script",
    "quantizers": _EARLIER_STUDENT,
    "remedies": "of an earlier script, without its bar",
    "repeatability": _EARLIER_STUDENT,
    "service_level": _EARLIER_STUDENT,
    "tune": "without the bar for AMX, which that machine lacks",
}


def results() -> list[Any]:
    """Every kept result of a benchmark; those in `AGAIN` must fail."""
    names = sorted(path.stem for path in RESULTS.glob("*.json") if path.stem not in DEMO)
    marks = {
        name: [pytest.mark.xfail(reason=why, raises=AssertionError)] for name, why in AGAIN.items()
    }
    return [pytest.param(name, id=name, marks=marks.get(name, [])) for name in names]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def declared(name: str, constant: str) -> Any:
    """A literal of the benchmark that makes a result; None where it has none."""
    script = BENCHMARKS / f"{name.replace('-', '_')}.py"
    assert script.is_file(), f"{name}.json is of no benchmark"
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if constant in names:
                return ast.literal_eval(node.value)
    return None


def git(*words: str) -> str:
    """What git prints; skips the test in a tree without the whole history."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        shallow = subprocess.run(
            ["git", "rev-parse", "--is-shallow-repository"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if shallow.stdout.strip() != "false":
        pytest.skip("not a clone with the whole history")
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.mark.parametrize("name", [path.stem for path in sorted(RESULTS.glob("*.json"))])
def test_a_result_is_of_a_commit_in_the_history(name: str) -> None:
    if name in DEMO:
        commit = git("log", "-1", "--format=%H", "--", f"profiles/results/{name}.json")
        of_demo = bundle_hash(git("show", f"{commit}:{BUNDLE}").encode())
        assert of_demo == bundle_hash((ROOT / BUNDLE).read_bytes()), "of another bundle"
        return
    source = read(name)["source"]
    assert set(source) == {"commit", "dirty", "from_history"}
    assert source["from_history"] or source["dirty"] is False, "the tree had other changes"
    assert re.fullmatch("[0-9a-f]{40}", source["commit"])
    assert git("cat-file", "-t", source["commit"]) == "commit"
    assert git("merge-base", source["commit"], "HEAD") == source["commit"], "not before this commit"


@pytest.mark.parametrize("name", results())
def test_a_result_is_of_what_is_here_now(name: str) -> None:
    found, rules = read(name), declared(name, "BARS") or {}
    models = declared(name, "KEPT_MODELS") or ()
    assert found["kept_models"] == {model: model_hash(ROOT / model) for model in models}
    bars = found.get("bars", [])
    for bar in bars:
        rule = find_rule(rules, bar["name"])
        assert rule is not None, f"the benchmark has no bar {bar['name']!r}"
        direction, bound, unit = rule
        assert (bar["direction"], bar["unit"]) == (direction, unit), bar["name"]
        assert bound is None or bar["bound"] == bound, bar["name"]
    names = [bar["name"] for bar in bars]
    missing = [
        key
        for key, rule in rules.items()
        if not any(find_rule({key: rule}, name) for name in names)
    ]
    assert not missing, "bars that the result does not have"


def test_only_kept_results_are_to_be_measured_again() -> None:
    assert all((RESULTS / f"{name}.json").is_file() for name in AGAIN)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_figure_files_that_exist(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        for name in re.findall(r"profiles/results/([\w-]+)\.json", line):
            assert (RESULTS / f"{name}.json").is_file(), f"line {number}: there is no {name}.json"
            if name in AGAIN and path.name != "CHANGELOG.md":
                told = " ".join(lines[number - 1 : number + 1])
                assert "earlier" in told, f"line {number}: figures {AGAIN[name]}"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_bars_can_be_read_without_running(path: Path) -> None:
    for name, (direction, bound, unit) in (declared(path.stem, "BARS") or {}).items():
        assert name
        assert direction in (">=", "<=")
        assert bound is None or isinstance(bound, int | float)
        assert isinstance(unit, str)
    for model in declared(path.stem, "KEPT_MODELS") or ():
        assert model_hash(ROOT / model)


SCRIPT = """
import sys
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from _bars import at_most, finish, hold
from edgeclip.runtime.stats.interval import Interval

BARS = {{"size": ("<=", 5, "MB"), "*_rate": (">=", None, "1/s")}}
KEPT_MODELS = ("export/emoji_bundle",)
rate = Interval(3.0, 2.0, float("inf"))
bars = [hold(BARS, "size", 4.0), hold(BARS, "small_rate", rate, 2.5)]
bars += [at_most("other", 1.0, 2.0)] if sys.argv[2:] else []
sys.exit(finish(bars, Path(sys.argv[1])))
"""


@pytest.mark.parametrize(("more", "status"), [((), 0), (("undeclared",), 1)])
def test_a_benchmark_records_what_it_measured(
    more: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)), encoding="utf-8")
    words = [sys.executable, str(script), str(out), *more]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("not as BARS declares: other" in done.stdout) is bool(more)
    found = json.loads(out.read_text(), parse_constant=pytest.fail)  # no infinite numbers
    assert found["kept_models"] == {"export/emoji_bundle": model_hash(ROOT / "export/emoji_bundle")}
    assert found["source"]["from_history"] is False
    assert found["source"]["commit"] in (None, git("rev-parse", "HEAD"))
    size, rate = found["bars"][:2]
    assert (size["direction"], size["bound"], size["unit"], size["passed"]) == ("<=", 5, "MB", True)
    assert (rate["bound"], rate["unit"], rate["interval"]["high"]) == (2.5, "1/s", None)
