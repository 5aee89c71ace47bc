"""What was found about each consumer: rows for the record, and the table that people read."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from _consumer_cases import Case

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.console import columns

# What is held to the bar, by tower and kind of input, and what it is called there.
HELD = {
    ("image", "same"): "image",
    ("image", "own, no resizing"): "png",
    ("text", "same"): "text",
    ("text", "own"): "captions",
}
# Told but not held to the bar: on some processors OpenVINO computes in bfloat16 by default.
_FREE = "default precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One class of one consumer on one tower of one model.

    Attributes:
        given: the `same` arrays as EdgeCLIP's runtime; captions or pictures, for which the
            consumer uses its `own` preprocessing; pictures that need `no resizing`; captions
            that are `too long`, which it cuts itself.
        max_abs: largest difference of an embedding's element; None if it did not run.
        min_cosine: of all inputs.
        same_ids: whether its tokenizer gave the same ids.
        pixel_levels: (mean, largest) difference of its pixels, of 255.
        why: why it did not run.
    """

    consumer: str
    version: str
    reader: str
    model: str
    tower: str
    given: str
    max_abs: float | None = None
    min_cosine: float | None = None
    same_ids: bool | None = None
    pixel_levels: tuple[float, float] | None = None
    why: str = ""

    @property
    def held(self) -> bool:
        """Whether the bar is for this row."""
        return (self.tower, self.given) in HELD and _FREE not in self.reader


@dataclass(slots=True)
class Lines:
    """The rows of all models that the table shows as one line."""

    rows: list[Row] = field(default_factory=list)

    def text(self) -> str:
        """Largest difference, and what else is known."""
        ran = [row for row in self.rows if row.max_abs is not None]
        if not ran:
            return f"not run: {self.rows[0].why}"
        parts = [f"{max(row.max_abs or 0.0 for row in ran):.2e}"]
        failed = {row.model: row.why for row in self.rows if row.max_abs is None}
        cosine = min(row.min_cosine for row in ran if row.min_cosine is not None)
        if cosine < 0.9999:
            parts.append(f"cosine down to {cosine:.4f}")
        levels = [row.pixel_levels for row in ran if row.pixel_levels is not None]
        if levels:
            mean, most = (max(pair[i] for pair in levels) for i in (0, 1))
            parts.append(
                f"its pixels differ by {mean:.2f} levels of 255 on average, {most:.0f} at most"
            )
        if any(row.same_ids is False for row in ran):
            parts.append("its token ids differ")
        parts += [f"{model} not run: {why}" for model, why in failed.items()]
        return "; ".join(parts)


def rows_of(consumer: str, found: dict[str, Any], cases: dict[str, Case]) -> Iterator[Row]:
    """Hold what a consumer said against EdgeCLIP's runtime."""
    for item in found["rows"]:
        case = cases[item["model"]]
        row = {key: item[key] for key in ("reader", "model", "tower", "given")}
        row["why"] = item["why"].replace(f"{case.folder}{os.sep}", "")
        if item["embeddings"] is not None:
            got = np.array(item["embeddings"], np.float32)
            row |= _difference(got, case.wanted(item["tower"], item["given"]))
        if item["ids"] is not None and item["given"] == "own":
            row["same_ids"] = item["ids"] == case.ids
        if item["pixels"] is not None:
            wanted = case.pixels[item["given"]]
            got = np.array(item["pixels"], np.float32).reshape(wanted.shape)
            std = np.array(case.spec.std, np.float32).reshape(3, 1, 1)
            levels = np.abs(got - wanted) * std * 255
            row["pixel_levels"] = (float(levels.mean()), float(levels.max()))
        yield Row(consumer=consumer, version=found["version"], **row)


def torch_rows(cases: dict[str, Case]) -> Iterator[Row]:
    """The models as they were before they were exported."""
    for name, case in cases.items():
        for tower, got in case.torch.items():
            row = _difference(got, case.wanted(tower, "same"))
            yield Row(
                consumer="torch",
                version=torch.__version__,
                reader="DualEncoder",
                model=name,
                tower=tower,
                given="same",
                **row,
            )


def _difference(got: FloatArray, wanted: FloatArray) -> dict[str, Any]:
    if got.shape != wanted.shape:
        raise ValueError(f"embeddings of shape {got.shape} in place of {wanted.shape}")
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines = (got * wanted).sum(axis=1) / lengths
    return {"max_abs": float(np.abs(got - wanted).max()), "min_cosine": float(cosines.min())}


def table(rows: Iterable[Row]) -> str:
    """One line for each consumer, class, tower and kind of input, over all models."""
    lines: dict[tuple[str, ...], Lines] = {}
    for row in rows:
        key = (f"{row.consumer} {row.version}", row.reader, row.tower, row.given)
        lines.setdefault(key, Lines()).rows.append(row)
    cells: list[tuple[str, ...]] = [("consumer", "class", "tower", "input", "max abs difference")]
    cells += [(*key, line.text()) for key, line in lines.items()]
    return columns(cells, left=5)
