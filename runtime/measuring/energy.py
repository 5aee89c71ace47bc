"""Energy of the processor, where Linux counts it (powercap, "Running Average Power Limit").

Source: https://docs.kernel.org/power/powercap/powercap.html. Counters are in microjoules and
start again at `max_energy_range_uj`. They cover a whole package, with whatever else it does.
Most systems let only root read them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/class/powercap")
_LEAST_SECONDS = 0.2  # counters move about once a millisecond


@dataclass(frozen=True, slots=True)
class _Package:
    counter: Path
    range_uj: int


@dataclass(frozen=True, slots=True)
class EnergyMeter:
    """The packages of this machine."""

    name: str
    packages: tuple[_Package, ...]

    @classmethod
    def find(cls, root: Path = _ROOT) -> "EnergyMeter | None":
        """Return a meter; None where there is no counter that may be read."""
        packages = []
        for folder in sorted(root.glob("intel-rapl:?")):
            counter = folder / "energy_uj"
            try:
                int(counter.read_text())
                packages.append(
                    _Package(counter, int((folder / "max_energy_range_uj").read_text()))
                )
            except (OSError, ValueError):
                continue
        return cls("RAPL packages", tuple(packages)) if packages else None

    def joules_of(self, run: Callable[[], object], seconds: float = _LEAST_SECONDS) -> float:
        """Energy of one call of `run`, idle power included, from calls for some seconds."""
        before, began, calls = self._read(), time.perf_counter(), 0
        while time.perf_counter() - began < seconds or calls == 0:
            run()
            calls += 1
        spent = sum(
            (now - then) % package.range_uj
            for now, then, package in zip(self._read(), before, self.packages, strict=True)
        )
        return spent / 1e6 / calls

    def _read(self) -> list[int]:
        return [int(package.counter.read_text()) for package in self.packages]
