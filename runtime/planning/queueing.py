"""How long a request waits for a server that others use too."""

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError

Values = NDArray[np.float64]


def draw_waiting(service_ms: Values, utilisation: float, rng: np.random.Generator) -> Values:
    """Draw as many waiting times of an M/G/1 queue as there are service times [N]; milliseconds.

    The wait is a geometric number of residual service times (Pollaczek and Khinchine; Kleinrock,
    "Queueing Systems", volume 1, 1975, section 5.7): P(n) = (1 - rho) rho^n, each of them a
    uniform share of a service time drawn with a weight of its own length. Its mean is
    rho E[S^2] / (2 E[S] (1 - rho)).

    Args:
        service_ms: of each request [N]; those of the others are taken to be alike.
        utilisation: rho, the share of time that the server is busy, 0 to below 1.
        rng: of the draws.

    Raises:
        InputError: a utilisation out of bounds.
    """
    if not 0 <= utilisation < 1:
        raise InputError(
            f"a utilisation of {utilisation:g} is out of bounds: give 0 to below 1, where a server "
            "still keeps up"
        )
    count = len(service_ms)
    waits = np.zeros(count)
    total = service_ms.sum()
    if utilisation == 0 or total == 0:
        return waits
    ahead = rng.geometric(1 - utilisation, count) - 1
    lengths = rng.choice(service_ms, int(ahead.sum()), p=service_ms / total)
    residuals = lengths * rng.random(len(lengths))
    np.add.at(waits, np.repeat(np.arange(count), ahead), residuals)
    return waits
