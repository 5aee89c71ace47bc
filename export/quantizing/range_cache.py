"""Ranges that calibration found, kept for the next config of the same graph.

Calibration is most of the time that quantizing takes, and what it finds does not depend on
which nodes are quantized.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from edgeclip.export.activation_bounds import EXTREMES, Bounds, Ranging, activation_bounds
from edgeclip.export.calibrate import CalibrationData
from edgeclip.export.graph import sha256_graph
from edgeclip.runtime.files import atomic_file


def cache_file(cache: Path, source: Path, *what: object) -> Path:
    """Return the file in a cache's folder for `what` of a graph, whose content is in its name."""
    parts = "\n".join([onnxruntime.__version__, sha256_graph(source), *map(str, what)])
    return cache / f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.json"


def cached_bounds(
    source: Path,
    data: CalibrationData,
    ranging: Ranging = EXTREMES,
    operators: Sequence[str] | None = None,
    *,
    cache: Path | None,
) -> Bounds:
    """Return what `activation_bounds` does, from a file of the cache if it was asked before.

    `cache` is a folder that belongs to this calibration data alone; None for no cache.
    """
    if cache is None:
        return activation_bounds(source, data, ranging, operators)
    path = cache_file(cache, source, "bounds", ranging, operators)
    if path.exists():
        bounds: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return bounds
    found = activation_bounds(source, data, ranging, operators)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(dict(found)), encoding="utf-8")
    return found
