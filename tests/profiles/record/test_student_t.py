import pytest

from edgeclip.profiles.record.timing_statistics import chance_below, quantile

# Abramowitz and Stegun, table 26.10.
TABLE = [
    (0.975, 1, 12.706),
    (0.95, 1, 6.314),
    (0.975, 4, 2.776),
    (0.95, 8, 1.860),
    (0.999, 3, 10.215),
    (0.975, 30, 2.042),
    (0.975, 1e6, 1.960),
]


@pytest.mark.parametrize(("chance", "degrees", "t"), TABLE)
def test_quantiles_and_chances_are_those_of_the_table(
    chance: float, degrees: float, t: float
) -> None:
    assert quantile(chance, degrees) == pytest.approx(t, abs=6e-4)
    assert chance_below(t, degrees) == pytest.approx(chance, abs=1e-4)


@pytest.mark.parametrize("degrees", [1, 2.5, 7.81, 40, 1000])
@pytest.mark.parametrize("chance", [0.001, 0.05, 0.3, 0.5, 0.9, 0.9999])
def test_a_quantile_has_its_chance_and_its_mirror(degrees: float, chance: float) -> None:
    t = quantile(chance, degrees)
    assert chance_below(t, degrees) == pytest.approx(chance, abs=1e-9)
    assert quantile(1 - chance, degrees) == pytest.approx(-t, rel=1e-6, abs=1e-9)
