"""What every benchmark shares: its bars, its options, its JSON file, last lines and exit status.

A benchmark declares what it holds as literals, so that they can be read without running it:

    BARS = {"start": ("<=", 1.5, "s"), "*_parity": ("<=", 1e-5, "")}
    KEPT_MODELS = ("export/emoji_bundle",)

`BARS` has the direction, bound and unit of each bar by its name, or by a pattern of names (`*`);
a bound of None depends on the run. `KEPT_MODELS` are the folders of kept weights that are measured.
`tests/test_kept_results.py` holds what `profiles/results` keeps against both.
"""

import argparse
import hashlib
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.stats.interval import Interval

ROOT = Path(__file__).parents[2]
EMOJI_BUNDLE = ROOT / "export" / "emoji_bundle"  # the built-in student's
RESULTS = "profiles/results"
sys.path.append(str(ROOT))  # for `tests`, which is not installed

Direction = Literal[">=", "<="]
Rule = tuple[Direction, float | None, str]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bound that a measured value must meet; its interval is that of 95%.

    In `server.py` it is from the lowest to the highest of a few runs.
    """

    name: str
    value: float
    direction: Literal[">=", "<="]
    bound: float
    unit: str = ""
    interval: Interval | None = None

    @property
    def passed(self) -> bool:
        """Whether the value itself meets the bound."""
        above = self.value >= self.bound
        return bool(above if self.direction == ">=" else self.value <= self.bound)

    def line(self) -> str:
        """`BAR name: value unit (bar >= x) pass`."""
        unit = f" {self.unit}" if self.unit else ""
        verdict = "pass" if self.passed else "miss"
        bound = f"(bar {self.direction} {self.bound:g})"
        return f"BAR {self.name}: {self.value:.4g}{unit} {bound} {verdict}"


def find_rule(rules: Mapping[str, Rule], name: str) -> Rule | None:
    """The rule of a bar: that of its name, else of the first pattern that fits."""
    if name in rules:
        return rules[name]
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def hold(
    rules: Mapping[str, Rule], name: str, value: float | Interval, bound: float | None = None
) -> Bar:
    """A bar as it is declared; of an interval the value counts, not its ends.

    Args:
        rules: `BARS` of the benchmark.
        name: of the bar.
        value: what was measured.
        bound: where the declared one is None.

    Raises:
        LookupError: no such bar is declared, or no bound.
    """
    rule = find_rule(rules, name)
    if rule is None:
        raise LookupError(f"BARS has no {name!r}: declare it there")
    direction, declared, unit = rule
    bound = declared if bound is None else bound
    if bound is None:
        raise LookupError(f"BARS leaves the bound of {name!r} to the run: give it")
    if isinstance(value, Interval):
        return Bar(name, value.value, direction, bound, unit, value)
    return Bar(name, value, direction, bound, unit)


def at_least(name: str, value: float | Interval, bound: float, unit: str = "") -> Bar:
    """A bar of a least value, whose bound a library of the benchmark's knows."""
    return hold({name: (">=", bound, unit)}, name, value)


def at_most(name: str, value: float | Interval, bound: float, unit: str = "") -> Bar:
    """A bar of a largest value, likewise."""
    return hold({name: ("<=", bound, unit)}, name, value)


def span(item: Interval, digits: int = 3) -> str:
    """`value [low, high]`; an end that the data do not tell in words."""
    value, low, high = (f"{end:.{digits}f}" for end in (item.value, item.low, item.high))
    if math.isinf(item.low) and math.isinf(item.high):
        return f"{value} [too few to bound it]"
    if math.isinf(item.high):
        return f"{value} [at least {low}]"
    return f"{value} [at most {high}]" if math.isinf(item.low) else f"{value} [{low}, {high}]"


def say(line: str) -> None:
    """Tell on stderr what is going on."""
    print(line, file=sys.stderr, flush=True)


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser


def command() -> str:
    return shlex.join(["python", *sys.argv])


def model_hash(folder: Path) -> str:
    """SHA-256 of kept weights; of a bundle that of the files its manifest lists."""
    manifest = folder / "edgeclip.json"
    if manifest.is_file():
        return bundle_hash(manifest.read_bytes())
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def bundle_hash(manifest: bytes) -> str:
    """SHA-256 of the lines "HASH  PATH" of all files that a bundle's manifest lists, sorted.

    What else stands in a manifest, such as the gates, changes no figure of the bundle.
    """
    lines = sorted(f"{file['sha256']}  {file['path']}" for file in json.loads(manifest)["files"])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _source() -> dict[str, Any]:
    """The commit that is measured, and whether anything but the results differs from it."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "from_history": False,
    }


def plain(value: Any) -> Any:
    """What JSON can hold of a value: infinite ends and NaN become null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finish(bars: Sequence[Bar], out: Path | None, **found: Any) -> int:
    """Write the JSON file, `found` in it; print a line a bar.

    Returns:
        The exit status: 1 for a miss, and for a bar that is not as the benchmark declares it.
    """
    if out is not None:
        models = getattr(sys.modules["__main__"], "KEPT_MODELS", ())
        record = {
            "command": command(),
            "source": _source(),
            "kept_models": {model: model_hash(ROOT / model) for model in models},
            "machine": detect_machine(),
            **found,
            "bars": [asdict(bar) | {"passed": bar.passed} for bar in bars],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps(plain(record), indent=2, default=asdict, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    print()
    for bar in bars:
        print(bar.line())
    others = [bar.name for bar in bars if not _is_declared(bar)]
    if others:
        print(f"not as BARS declares: {', '.join(others)}")
    return 0 if all(bar.passed for bar in bars) and not others else 1


def _is_declared(bar: Bar) -> bool:
    rules: Mapping[str, Rule] = getattr(sys.modules["__main__"], "BARS", {})
    rule = find_rule(rules, bar.name)
    if rule is None:
        return not rules  # a benchmark that declares nothing is held to nothing
    direction, bound, unit = rule
    return (direction, unit) == (bar.direction, bar.unit) and bound in (None, bar.bound)
