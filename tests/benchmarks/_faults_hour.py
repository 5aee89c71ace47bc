"""An hour with a call every so often and some seconds of faults in it.

Where all is well, the time between two calls is left out: each call is really made, one after
the other. From the beginning of a fault to a few seconds after its end, time is real.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from _faults_cases import DEADLINE_MS, GRACE_MS, Bench, Fault, Seen

from edgeclip.profiles.record.conditions import CpuSnapshot

_AFTERWARDS_S = 3.0  # until time is left out again
_AWAY_S = 0.5  # before a killed server is started again


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """What came of it.

    Attributes:
        seconds: how long the hour was: the number of calls over their rate.
        calls: all of them, evenly spread over it.
        faults: how often something failed.
        faulty_s: for how long, all together.
        answered: share of the calls answered by the deadline and 20 ms.
        full: share of the calls answered as planned.
        worst_ms: of the slowest call, beyond the deadline.
        denied: see `Case`.
    """

    seconds: float
    calls: int
    faults: int
    faulty_s: float
    answered: float
    full: float
    worst_ms: float
    denied: float | None


def run_hour(
    bench: Bench,
    faults: Mapping[str, Fault],
    *,
    seconds: float,
    faulty_s: float,
    per_second: float,
) -> Hour:
    """Spread faults evenly over the hour; together they last `faulty_s`, restarts included.

    A killed server is away until it has started again, however long that takes: it comes
    first, and the others share what is left.
    """
    quiet = round((seconds - len(faults) * _AFTERWARDS_S - faulty_s) / len(faults) * per_second)
    seen: list[Seen] = []
    spent = 0.0
    before = CpuSnapshot.take()
    for number, (name, fault) in enumerate(faults.items()):
        seen += [bench.call() for _ in range(quiet)]
        lasts = _AWAY_S if name == "killed" else (faulty_s - spent) / (len(faults) - number)
        outage = bench.during(fault, lasts, per_second)
        spent += outage.ended - outage.began
        seen += outage.seen + bench.calls(_AFTERWARDS_S, per_second)
    late = np.array([each.ms - DEADLINE_MS for each in seen])
    return Hour(
        seconds=len(seen) / per_second,
        calls=len(seen),
        faults=len(faults),
        faulty_s=spent,
        answered=float((late <= GRACE_MS).mean()),
        full=sum(each.degraded is None for each in seen) / len(seen),
        worst_ms=float(late.max()),
        denied=CpuSnapshot.take().denied_since(before)[0],
    )
