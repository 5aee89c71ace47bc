"""How long `import edgeclip.runtime` takes in a fresh process, and that torch stays out."""

import json
import subprocess
import sys

import numpy as np
from _bars import Bar, finish, options

from edgeclip.runtime.intervals import Interval

_CHILD = """
import json, sys, time
start = time.perf_counter()
import edgeclip.runtime
print(json.dumps([time.perf_counter() - start, "torch" in sys.modules]))
"""


def main() -> int:
    """Start fresh processes, and quote the median."""
    args = options(__doc__ or "").parse_args()
    runs = 5 if args.quick else 25
    seconds, torch_loaded = [], False
    for _ in range(runs):
        child = subprocess.run(
            [sys.executable, "-c", _CHILD], check=True, capture_output=True, text=True
        )
        spent, loaded = json.loads(child.stdout)
        seconds.append(spent)
        torch_loaded = torch_loaded or loaded
    low, median, high = (float(v) for v in np.percentile(seconds, (0, 50, 100)))
    print(f"import edgeclip.runtime: median {median:.3f} s, {low:.3f} to {high:.3f}, {runs} runs")
    bars = [
        Bar(
            name="import_time",
            value=median,
            direction="<=",
            bound=0.3,
            unit="s",
            interval=Interval(median, low, high),
        ),
        Bar(name="torch_loaded", value=float(torch_loaded), direction="<=", bound=0),
    ]
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
