"""Mask what differs between machines and runs in what a command printed or wrote."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Lines that a command prints on some machines only, or on busy ones.
_OF_THE_MACHINE = re.compile(
    r"CONTENDED|DISTURBED|No energy counter|This system does not tell|Not steady after"
    r"|Other work kept|.*UserWarning"
)
_PROGRESS = re.compile(r"\d+%\|")
_HASH = re.compile(r"\b(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{12,64}\b")
# Not the figures in fp32, jpeg-75 or R@1, nor in the name of a picture.
_NUMBER = re.compile(
    r"(?<![A-Za-z_@\d])(?<![A-Za-z]-)(?!\d+\.png)[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
)
# Whether so few runs of a process know the ends of an interval differs from run to run.
_ENDS = (
    (re.compile(r"\[(?:not known|at (?:least|most) #)\]"), "[#, #]"),
    (re.compile(r"not known|at (?:least|most) #(?=  )"), "# to #"),
)
_SYSTEM = re.compile(r"\d+ cores?, [^;]+; workload")
_PROVIDERS = re.compile(r"\(it has [^)]*\)")
_CHOICES = re.compile(r"\(choose from [^)]*\)")
# JSON whose keys another package chooses, and keys below which they are the machine's.
_OF_OTHERS = {
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
_MACHINE_KEYS = {"after", "before", "cpu", "energy", "interference", "machine"}


def _without_numbers(line: str) -> str:
    line = _NUMBER.sub("#", line)
    for ends, masked in _ENDS:
        line = ends.sub(masked, line)
    return line


class Mask:
    """What is masked in the outputs of one session: its folder and its processor."""

    def __init__(self, folder: Path, processor: str) -> None:
        self._folders = sorted({str(folder), str(folder.resolve())}, key=len, reverse=True)
        name = rf"(?<![\w-]){re.escape(processor)}(?![\w-])"
        self._processor = re.compile(name) if processor else None

    def wrapped(self, text: str) -> str:
        """Help or a message of argparse, one entry a line, however it was wrapped."""
        entries = []
        for paragraph in self._machine(text).split("\n\n"):
            for place, line in enumerate(paragraph.strip("\n").splitlines()):
                if place == 0 or re.match(r"  \S|edgeclip", line):
                    entries.append(line.strip())
                else:
                    entries[-1] += f" {line.strip()}"
        joined = "\n".join(" ".join(entry.split()) for entry in entries)
        joined = re.sub(r"(?<=\w)- (?=[a-z])", "-", joined)  # broken at a hyphen
        joined = _CHOICES.sub(lambda found: found[0].replace("'", ""), joined)
        return re.sub(r"\b\d+\.\d+\.\d+\b", "VERSION", joined)

    def printed(self, text: str, *, keep_numbers: bool = False, drop: str | None = None) -> str:
        """What a good run printed; `drop` matches more lines to leave out."""
        lines = []
        for line in re.split(r"[\r\n]+", self._machine(text)):
            if _PROGRESS.search(line) or _OF_THE_MACHINE.match(line):
                continue
            if drop is not None and re.match(drop, line):
                continue
            line = _HASH.sub("HASH", _SYSTEM.sub("# cores, SYSTEM; workload", line))
            line = line if keep_numbers else _without_numbers(line)
            lines.append(" ".join(line.split()))
        return "\n".join(line for line in lines if line)

    def files(self, folder: Path, names: Iterable[str]) -> str:
        """Names of files, and below those that hold JSON the paths of all their keys."""
        lines = []
        for name in sorted(names):
            lines.append(_HASH.sub("HASH", name))
            path = folder / name
            if path.suffix in {".json", ".jsonl"} and path.name not in _OF_OTHERS:
                text = path.read_text(encoding="utf-8")
                values = text.splitlines() if path.suffix == ".jsonl" else [text]
                keys = {key for value in values for key in _key_paths(json.loads(value))}
                lines += [f"  {key}" for key in sorted(keys)]
        return "\n".join(lines)

    def _machine(self, text: str) -> str:
        for folder in self._folders:
            text = text.replace(folder, "DIR")
        text = _PROVIDERS.sub("(it has PROVIDERS)", text)
        return self._processor.sub("PROCESSOR", text) if self._processor else text


def _key_paths(value: Any, before: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{before}.{key}"
            yield path
            if key not in _MACHINE_KEYS:
                yield from _key_paths(inner, path)
    elif isinstance(value, list):
        for inner in value:
            yield from _key_paths(inner, f"{before}[]")
