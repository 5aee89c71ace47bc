"""A chart of a matrix of shares: darker for more, such as the CKA of two models' layers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeclip.profiles.report.drawing import COLOURS, SMALL, canvas, fit, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WRITTEN = 8  # columns up to which the figures have room
_ROOM = 262.0  # px
_TALLEST = 24.0  # px of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatChart:
    """A small chart of a matrix with values from 0 to 1, its first row on top.

    Attributes:
        title: what it shows.
        rows, columns: what a row and a column is, such as "student's layer"; both count from 1.
        values: a tuple for each row.
    """

    small = True
    title: str
    rows: str
    columns: str
    values: tuple[tuple[float, ...], ...]

    @property
    def description(self) -> str:
        """The largest value of each row."""
        best = [max(range(len(row)), key=row.__getitem__) for row in self.values]
        return "; ".join(
            f"{self.rows} {at}: most in {self.columns} {place + 1}, {row[place]:.2f}"
            for at, (row, place) in enumerate(zip(self.values, best, strict=True), 1)
        )

    def draw(self, *, narrow: bool) -> "Figure | None":
        """Draw the cells; None without any."""
        if not self.values or not self.values[0]:
            return None
        from matplotlib.patches import Rectangle

        height, width = len(self.values), len(self.values[0])
        step = min(_TALLEST, _ROOM / height)
        top = 46.0
        foot = top + step * height
        figure, axes = canvas(SMALL, foot + 24, left=40, right=334, top=top, foot=foot)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        every = 1 if max(width, height) <= 16 else 4
        axes.set_xticks([])
        axes.set_yticks(
            [at + 0.5 for at in range(0, height, every)],
            labels=[str(at + 1) for at in range(0, height, every)],
        )
        for at, row in enumerate(self.values):
            for place, value in enumerate(row):
                shade = min(1.0, max(0.02, value))
                axes.add_patch(
                    Rectangle((place, at), 1, 1, facecolor=COLOURS["blue"], alpha=0.55 * shade,
                              edgecolor=COLOURS["paper"], linewidth=1)
                )  # fmt: skip
                if width <= _WRITTEN and step > 15:
                    x = 40 + (place + 0.5) * 294 / width
                    write(figure, x, top + step * (at + 0.5) + 5, f"{value:.2f}", colour="ink",
                          anchor="center", inside=True)  # fmt: skip
        write(figure, 2, 14, fit(self.title, SMALL - 4, bold=True), colour="ink", bold=True)
        write(figure, 2, 36, fit(f"rows: {self.rows}", SMALL - 4))
        write(figure, 334, foot + 18, fit(f"columns: {self.columns}, from 1", 330), anchor="right")
        return figure
