"""A bound on what retries add to the load, so that clients never keep a sick server down."""

import threading

from edgeclip.runtime.errors import InputError


class RetryBudget:
    """A token bucket: each call pays in `share`, each retry or hedge takes out 1.

    Over any number of calls there are at most `share` times as many extra attempts, and
    `most` beyond that. A budget that is full lasts for a short disturbance; in a long one,
    retries fall to the share.

    Source: Finagle's RetryBudget (finagle.github.io/blog/2016/02/08/retry-budgets) and gRPC's
    retry throttling (gRFC A6, proposal A6-client-retries.md); the idea of 10% is that of
    Beyer et al., Site Reliability Engineering (2016), chapter 21, "Handling Overload".

    Args:
        share: of the calls, at least 0.
        most: tokens that can be saved up; the bucket starts full.

    Raises:
        InputError: one of them is below 0.
    """

    def __init__(self, share: float = 0.1, most: float = 5.0) -> None:
        if share < 0 or most < 0:
            raise InputError(f"a retry budget of {share:g} per call, at most {most:g}: both from 0")
        self._share, self._most = share, most
        self._tokens = most
        self._lock = threading.Lock()

    def deposit(self) -> None:
        """Count a call."""
        with self._lock:
            self._tokens = min(self._most, self._tokens + self._share)

    def withdraw(self) -> bool:
        """Ask for one more attempt; False if the budget does not allow it."""
        with self._lock:
            # Ten deposits of 0.1 are a little less than 1 in binary.
            if self._tokens < 1 - 1e-9:
                return False
            self._tokens = max(0.0, self._tokens - 1)
            return True
