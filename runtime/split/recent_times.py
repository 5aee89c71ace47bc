"""What the last runs of something took, and what the next one will take at most, probably."""

import threading
from collections import deque

from edgeclip.runtime.errors import InputError


class RecentTimes:
    """Quantiles of the last durations.

    Args:
        keep: how many durations count, at least 1.
    """

    def __init__(self, keep: int = 64) -> None:
        if keep < 1:
            raise InputError(f"keep is {keep}: remember at least 1 duration")
        self._seconds: deque[float] = deque(maxlen=keep)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seconds)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._seconds.append(seconds)

    def quantile(self, share: float) -> float | None:
        """The duration that `share` of the runs did not exceed; None before the first run.

        The nearest rank is taken, so that it is a duration that really occurred.
        """
        with self._lock:
            ordered = sorted(self._seconds)
        if not ordered:
            return None
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
