"""How long `from edgeclip.runtime import Encoder` takes in a fresh process; torch stays out.

`import edgeclip.runtime` alone loads next to nothing: its names are looked up when asked for.
"""

import json
import subprocess
import sys

import numpy as np
from _bars import Bar, finish, options

from edgeclip.profiles.record.timing_statistics import percentile_interval

_CHILD = """
import json, sys, time
start = time.perf_counter()
from edgeclip.runtime import Encoder
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
    median = percentile_interval(np.array(seconds), 50)
    span = f"[{median.low:.3f}, {median.high:.3f}]"
    print(
        f"the encoder: median {median.value:.3f} s {span}, "
        f"{min(seconds):.3f} to {max(seconds):.3f}, {runs} runs"
    )
    bars = [
        Bar(
            name="import_time",
            value=median.value,
            direction="<=",
            bound=0.3,
            unit="s",
            interval=median,
        ),
        Bar(name="torch_loaded", value=float(torch_loaded), direction="<=", bound=0),
    ]
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
