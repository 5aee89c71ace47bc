"""A measured device whose costs follow a known law, so that predictions have a right answer."""

from collections.abc import Callable

from edgeclip.export.probes.probe_plan import STANDARD
from edgeclip.profiles.predict.measured_device import BlockCost, CheckTime, MeasuredDevice
from edgeclip.profiles.predict.tower_shapes import AnyTower, ConvTower, TowerBlock, TransformerTower
from edgeclip.runtime.device.device_profile import DeviceProfile, device_from_machine
from edgeclip.runtime.device.machine import Machine
from edgeclip.runtime.spec import Precision
from edgeclip.runtime.stats.interval import Interval

Law = Callable[[TowerBlock, Precision], float]

MACHINE = Machine(
    cpu="Known CPU",
    cores=2,
    flags=("avx2", "avx_vnni"),
    memory_mb=8000,
    os="Linux",
    python="CPython 3.11",
    packages=(),
)
_SPEED = {"fp32": 50e6, "fp16": 50e6, "int8": 120e6, "fp8": 50e6}  # multiply-adds a millisecond


def multiply_adds(block: TowerBlock) -> float:
    """Products and sums of a block; the same for every kind, near enough for a law."""
    width, at = block.width, block.positions
    if block.kind in ("image-stem", "conv-stem"):
        return 3 * block.patch**2 * at * width
    if block.kind in ("image-block", "text-block"):
        return at * (4 * width**2 + 2 * width * block.hidden) + 2 * at**2 * width
    if block.kind in ("image-last", "text-last"):
        return 2 * at * width**2 + 2 * width**2 + 2 * width * block.hidden + width * block.given
    if block.kind in ("conv-block", "grn-block"):
        return at * (8 * width**2 + 49 * width)
    return 4 * at * max(1, block.given) * width if block.kind == "conv-down" else width * 512


def law(block: TowerBlock, precision: Precision) -> float:
    """Milliseconds: nodes to start, products, and values to move; narrow blocks run slower."""
    stays_float = block.kind in ("image-stem", "conv-stem", "conv-down")
    speed = _SPEED["fp32" if stays_float else precision]
    products = multiply_adds(block) / speed * (1 + 20 / block.width)
    return 0.01 + products + block.positions * block.width / 2e6


def tower_ms(tower: AnyTower, precision: Precision, ms: Law = law) -> float:
    """What a tower takes by a law."""
    return sum(part.count * ms(part.piece, precision) for part in tower.parts())


def image(width: int, layers: int, tokens: int, patch: int) -> TransformerTower:
    """An image tower with heads of 64 channels."""
    return TransformerTower(
        part="image",
        width=width,
        heads=width // 64,
        hidden=4 * width,
        layers=layers,
        tokens=tokens,
        dim=512,
        patch=patch,
    )


TOWERS: tuple[AnyTower, ...] = (
    image(192, 6, 50, 32),
    image(384, 12, 197, 16),
    image(64, 1, 65, 8),
    TransformerTower(part="text", width=320, heads=5, hidden=1280, layers=6, tokens=12, dim=512),
    ConvTower(widths=(48, 96, 192), depths=(2, 2, 4), image_size=64, dim=512),
    ConvTower(widths=(40, 80, 160), depths=(2, 3, 6), image_size=224, dim=256),
)


def known_device(
    ms: Law = law, *, name: str = "known", few: bool = False, off: float = 0.0
) -> MeasuredDevice:
    """All that the standard probes would find, or only the few; whole towers take `off` more."""
    device: DeviceProfile = device_from_machine(MACHINE)
    return MeasuredDevice(
        name=name,
        created="2026-11-21T12:00:00+00:00",
        command="edgeclip measure-probes probes --out known.json",
        device=device,
        machine=MACHINE,
        rounds=30,
        costs=tuple(
            BlockCost(
                probe=probe.name,
                piece=probe.piece,
                precision=probe.graph.precision,
                ms=_exactly(ms(probe.piece, probe.graph.precision)),
                samples_ms=(ms(probe.piece, probe.graph.precision),),
                few=probe.few,
            )
            for probe in STANDARD.probes()
            if probe.few or not few
        ),
        checks=tuple(
            CheckTime(
                name=check.name,
                precision=check.graph.precision,
                parts=check.graph.tower.parts(),
                ms=_exactly((1 + off) * tower_ms(check.graph.tower, check.graph.precision, ms)),
            )
            for check in STANDARD.check_towers()
            if check.few or not few
        ),
    )


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)
