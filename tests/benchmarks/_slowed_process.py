"""A benchmark worker that slows down subjects whose name begins with "slowed".

After each run they spin for a share of its time: `EDGECLIP_SLOWED_BY`, 0.1 for 10%.
`slow_down()` lets `run_worker` start this process in place of the real one.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeclip.profiles.measure import benchmark_worker, worker_client
from edgeclip.profiles.measure.open_subject import OpenSubject, open_subject
from edgeclip.profiles.measure.subject import SubjectSpec
from edgeclip.runtime.bundle.bundle import Bundle

SLOWED = "slowed"
_SHARE = "EDGECLIP_SLOWED_BY"


def slow_down(share: float) -> None:
    """Slow such subjects by that share of their time in all processes started from now on."""
    os.environ[_SHARE] = str(share)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    worker_client._MODULE = Path(__file__).stem


def _open_slowed(spec: SubjectSpec, *, bundle: Bundle | None = None) -> OpenSubject:
    found = open_subject(spec, bundle=bundle)
    if not spec.name.startswith(SLOWED):
        return found
    share, run = float(os.environ[_SHARE]), found.target.run

    def slower(batch: NDArray[Any]) -> object:
        start = time.perf_counter()
        result = run(batch)
        end = time.perf_counter()
        until = end + share * (end - start)
        while time.perf_counter() < until:
            pass
        return result

    return replace(found, target=replace(found.target, run=slower))


if __name__ == "__main__":
    vars(benchmark_worker)["open_subject"] = _open_slowed
    sys.exit(benchmark_worker.main())
