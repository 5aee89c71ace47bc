"""Was the machine ours while we measured? What waited, what others used, what was slowed."""

import time
from pathlib import Path
from typing import Self

from edgeclip.runtime.sensing.busy_time import BusyTime
from edgeclip.runtime.sensing.conditions import Conditions, Interference
from edgeclip.runtime.sensing.cpu_time import CpuSnapshot
from edgeclip.runtime.sensing.nvml import SLOWDOWNS, NvmlGpu
from edgeclip.runtime.sensing.take_conditions import take_conditions

_TOO_MUCH = 0.10  # of a share, as for `CpuTime.contended`
_TOO_HOT = 0.01  # of the time, since counters of heat also move for a moment without meaning much
_HARDLY_RAN = 0.05  # of one core: a process that only waits for its children cannot tell


class InterferenceWatch:
    """Compares the machine before and after the block that it surrounds.

    The work may run in this process and in its children, which do not count as others. What is
    waited for a core is this process's own alone: children tell theirs in `CpuTime`.

    Args:
        root, gpu: see `take_conditions`.

    Attributes:
        before: conditions when the block began.
        after: conditions when it ended; there is none before.
        found: what else the machine did meanwhile; there is none before it ended.
    """

    before: Conditions
    after: Conditions
    found: Interference

    def __init__(self, root: Path = Path("/"), *, gpu: NvmlGpu | None = None) -> None:
        self._root, self._gpu = root, gpu

    def __enter__(self) -> Self:
        self.before = take_conditions(self._root, gpu=self._gpu)
        self._busy, self._cpu = BusyTime.take(self._root), CpuSnapshot.take()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._began
        cpu, busy = CpuSnapshot.take(), BusyTime.take(self._root)
        self.after = take_conditions(self._root, gpu=self._gpu)
        waiting, steal = cpu.denied_since(self._cpu)
        if cpu.process_s - self._cpu.process_s < _HARDLY_RAN * seconds:
            waiting = None
        others = None if busy is None or self._busy is None else busy.others_since(self._busy)
        self.found = judged(
            waiting_share=waiting,
            steal_share=steal,
            others_share=others,
            slowdowns=slowdowns_between(self.before, self.after, seconds),
        )


def judged(
    *,
    waiting_share: float | None = None,
    steal_share: float | None = None,
    others_share: float | None = None,
    slowdowns: tuple[str, ...] | None = None,
) -> Interference:
    """Put these on record, and say whether any was too much.

    Shares are too much above a tenth.

    Args:
        waiting_share, steal_share, others_share: see `Interference`.
        slowdowns: what slowed a processor, for a person; None if it cannot be told.
    """
    reasons = [
        words.format(share)
        for share, words in (
            (others_share, "other programs used {:.0%} of the processors"),
            (steal_share, "the hypervisor took {:.0%} of the processors"),
            (waiting_share, "{:.0%} of the CPU time asked for was spent waiting for a core"),
        )
        if share is not None and share > _TOO_MUCH
    ]
    reasons += slowdowns or ()
    told = (waiting_share, steal_share, others_share, slowdowns)
    return Interference(
        waiting_share=waiting_share,
        steal_share=steal_share,
        others_share=others_share,
        throttled=None if slowdowns is None else bool(slowdowns),
        disturbed=None if all(item is None for item in told) else bool(reasons),
        reasons=tuple(reasons),
    )


def slowdowns_between(
    before: Conditions, after: Conditions, seconds: float
) -> tuple[str, ...] | None:
    """What slowed a processor for its heat or its supply, for a person; None if nothing can tell.

    Args:
        before, after: of the same machine.
        seconds: between them.
    """
    earlier, gpu_earlier, gpu_later = (
        dict(before.throttle_counts),
        dict(before.gpu),
        dict(after.gpu),
    )
    found = [
        f"a processor was slowed for its heat or supply: {name} rose by {count - earlier[name]}"
        for name, count in after.throttle_counts
        if count > earlier.get(name, count)
    ]
    hot = "slowed by heat ms"
    if hot in gpu_earlier and hot in gpu_later and seconds > 0:
        share = (float(gpu_later[hot]) - float(gpu_earlier[hot])) / 1e3 / seconds
        if share > _TOO_HOT:
            found.append(f"the GPU was slowed for its heat for {min(1.0, share):.0%} of the time")
    held = gpu_later.get("clocks held by")
    slow = sorted(SLOWDOWNS & set((held or "").split(", ")))
    if slow:
        found.append(f"the GPU's clocks were held down: {', '.join(slow)}")
    tells = after.throttle_counts or hot in gpu_later or held is not None
    return tuple(found) if tells else None
