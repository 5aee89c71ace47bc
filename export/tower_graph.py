"""One tower in one precision, while it is being made into a bundle."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from edgeclip.runtime.spec import PixelForm, Precision, Tower

TOWERS: tuple[Tower, ...] = get_args(Tower)


@dataclass(frozen=True, slots=True)
class TowerGraph:
    """An ONNX file; `pixels` says what an image tower takes, and is None for a text tower."""

    tower: Tower
    precision: Precision
    path: Path
    pixels: PixelForm | None

    @property
    def subject(self) -> str:
        """What reports call it, such as "image int8"."""
        return f"{self.tower} {self.precision}"
