import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.planning.estimate import draw_waiting


def simulated(service: NDArray[np.float64], utilisation: float, seed: int) -> NDArray[np.float64]:
    """Waits in a queue with Poisson arrivals, by Lindley's recursion."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(service.mean() / utilisation, len(service))
    waits = np.zeros(len(service))
    for i in range(1, len(service)):
        waits[i] = max(0.0, waits[i - 1] + service[i - 1] - gaps[i])
    return waits


@pytest.mark.parametrize("utilisation", [0.3, 0.7])
def test_as_a_simulated_queue(utilisation: float) -> None:
    rng = np.random.default_rng(1)
    service = rng.gamma(2.0, 3.0, 200_000)
    drawn = draw_waiting(service, utilisation, rng)
    expected = simulated(service, utilisation, 2)
    formula = utilisation * (service**2).mean() / (2 * service.mean() * (1 - utilisation))
    assert drawn.mean() == pytest.approx(formula, rel=0.03)
    assert np.percentile(drawn, 95) == pytest.approx(np.percentile(expected, 95), rel=0.08)
    assert (drawn == 0).mean() == pytest.approx(1 - utilisation, abs=0.01)


def test_nobody_waits_for_an_idle_server() -> None:
    assert not draw_waiting(np.ones(100), 0.0, np.random.default_rng(0)).any()
    assert not draw_waiting(np.zeros(100), 0.5, np.random.default_rng(0)).any()


@pytest.mark.parametrize("utilisation", [1.0, -0.1, float("nan")])
def test_server_that_cannot_keep_up_is_refused(utilisation: float) -> None:
    with pytest.raises(InputError, match="utilisation"):
        draw_waiting(np.ones(10), utilisation, np.random.default_rng(0))
