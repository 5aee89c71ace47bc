"""The colours of the pages: contrast (WCAG 2.2) and difference for the colour-blind."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import edgeclip.profiles.report as reporting
from edgeclip.profiles.report.drawing import COLOURS, SERIES
from edgeclip.runtime.arrays import Values

STYLE = (Path(reporting.__path__[0]) / "report.css").read_text(encoding="utf-8")
# Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency", 2009: severity 1.0, for linear RGB.
BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def themes() -> dict[str, dict[str, str]]:
    """The variables of light, which print has too, and dark."""
    roots = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    named = [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", root)) for root in roots]
    return dict(zip(("light", "dark"), (root for root in named if root), strict=True))


def linear(colour: str) -> Values:
    parts = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: Values) -> Values:
    """CIE L*a*b* (D65) of linear RGB."""
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = matrix @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_charts_are_drawn_in_the_colours_of_the_light_theme() -> None:
    light = themes()["light"]
    assert {name: light[name] for name in COLOURS} == COLOURS
    assert set(COLOURS) <= set(themes()["dark"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_can_be_seen(theme: str) -> None:
    colours = themes()[theme]
    for name in ("ink", "muted", *SERIES):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in ("ink", "muted", "green", "orange"):
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    assert contrast(colours["bar"], colours["paper"]) >= 3


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["normal", *BLIND])
def test_neighbouring_series_differ_for_everyone(theme: str, kind: str) -> None:
    """Shapes and names tell series apart already; colours help where there are few."""
    colours = themes()[theme]
    matrix = np.array(BLIND[kind]) if kind in BLIND else np.eye(3)
    seen = {name: lab(matrix @ linear(colours[name])) for name in SERIES[:4]}
    for one, other in itertools.pairwise(seen):
        assert float(np.linalg.norm(seen[one] - seen[other])) >= 10, (one, other)


def test_print_looks_as_light_does() -> None:
    assert re.findall(r"@media (.*dark.*) \{", STYLE) == ["screen and (prefers-color-scheme: dark)"]
