"""How long `from edgeclip.runtime import Encoder` takes in a fresh process; torch stays out."""

import json
import subprocess
import sys

import numpy as np
from _bars import Rule, at_most, finish, options, span

from edgeclip.profiles.record.timing_statistics import latency_of

BARS: dict[str, Rule] = {"import_time": ("<=", 0.3, "s"), "torch_loaded": ("<=", 0, "")}

_CHILD = """
import json, sys, time
start = time.perf_counter()
from edgeclip.runtime import Encoder
print(json.dumps([time.perf_counter() - start, "torch" in sys.modules]))
"""


def main() -> int:
    args = options(__doc__).parse_args()
    runs = 5 if args.quick else 25
    said = [subprocess.check_output([sys.executable, "-c", _CHILD]) for _ in range(runs)]
    seconds, torch_loaded = zip(*map(json.loads, said), strict=True)
    typical = latency_of([np.array([taken]) for taken in seconds]).p50_ms  # here in seconds
    print(f"the encoder: {span(typical)} s, {min(seconds):.3f} to {max(seconds):.3f}, {runs} runs")
    bars = [
        at_most("import_time", typical, 0.3, "s"),
        at_most("torch_loaded", float(any(torch_loaded)), 0),
    ]
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
