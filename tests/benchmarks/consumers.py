"""The same ONNX files read by others: are their embeddings those of EdgeCLIP's runtime?

ONNX Runtime, OpenVINO, transformers.js and optimum's classes each read the fp32 towers of three
models in a process of their own. They get the very arrays that EdgeCLIP's runtime got ("same",
held to the bar), or the captions and the PNG files, for which they use their own tokenizer
and image processor. Those are held to the bar too, but where pictures have to be resized or
captions cut, the difference is only told: then the graph is not to blame.

transformers.js and optimum are installed under `--work`; `--quick` leaves them out.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _bars import Bar, finish, options
from _consumer_cases import write_cases
from _consumer_install import HERE, REQUIREMENTS, node_command, python_command
from _consumer_rows import HELD, Row, rows_of, table, torch_rows
from _environment import InstallError

_BOUND = 1e-3
_QUICK = ("onnxruntime", "openvino")
_INSTALLED = ("transformers.js", *REQUIREMENTS)
_SECONDS = 600


def run_consumer(consumer: str, work: Path, cases: Path) -> dict[str, Any]:
    """What a consumer's process says of all cases.

    Raises:
        InstallError: it cannot be installed, or its process failed.
    """
    if consumer == "transformers.js":
        command = node_command(work)
    elif consumer in REQUIREMENTS:
        command = python_command(work, consumer)
    else:
        command = [sys.executable, str(HERE / "run_towers.py"), consumer]
    out = cases.parent / f"{consumer}.json"
    try:
        done = subprocess.run(
            [*command, str(cases), str(out)],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"its process took more than {_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise InstallError(f"its process failed: {lines[-1]}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def bars(rows: Sequence[Row], expected: Sequence[str]) -> list[Bar]:
    """The largest difference for each consumer and input, how many consumers ran, and on all?"""
    held = [row for row in rows if row.held]
    worst: dict[str, float] = {}
    for row in held:
        if row.max_abs is not None:
            name = f"{row.consumer}_{HELD[row.tower, row.given]}"
            worst[name] = max(worst.get(name, 0.0), row.max_abs)
    both = [name for name in expected if {f"{name}_image", f"{name}_text"} <= set(worst)]
    # A class that reads one tower is meant for such files, and must read those of all models.
    fit = {(row.consumer, row.reader) for row in held if row.max_abs is not None}
    failed = sum(row.max_abs is None and (row.consumer, row.reader) in fit for row in held)
    return [
        *(Bar(name=name, value=worst[name], direction="<=", bound=_BOUND) for name in worst),
        Bar(name="consumers_run", value=len(both), direction=">=", bound=len(expected)),
        Bar(name="inputs_not_read", value=failed, direction="<=", bound=0),
    ]


def main() -> int:
    """Export, let everybody read, compare."""
    parser = options(__doc__ or "")
    build = Path(__file__).parents[2] / "build" / "consumers"
    parser.add_argument("--work", type=Path, default=build, help="where consumers are installed")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    expected = _QUICK if args.quick else (*_QUICK, *_INSTALLED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cases"
        cases = {case.folder.name: case for case in write_cases(root)}
        rows = list(torch_rows(cases))
        absent = []
        for consumer in expected:
            try:
                rows += rows_of(consumer, run_consumer(consumer, work, root), cases)
            except InstallError as error:
                absent.append(f"{consumer}  not run: {error}")
    print("\n".join([table(rows), *absent]))
    return finish(bars(rows, expected), args.out, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
