"""What was measured of a device, as a table for the terminal."""

import statistics

from edgeclip.runtime.predicting.measured_device import MeasuredDevice, PieceCost
from edgeclip.runtime.predicting.predict_latency import Predictor


def measured_table(measured: MeasuredDevice) -> str:
    """A line for each piece that was measured, and for each whole tower; then what to beware of."""
    lines = [f"{measured.name}: {measured.machine.cpu}, {measured.device.threads} threads", ""]
    lines.append(f"{'piece':<12}{'precision':<10}{'width':>6}{'positions':>10}{'ms':>10}  interval")
    lines += [_line(cost) for cost in measured.costs if cost.samples_ms]
    lines += ["", *_checks(measured)]
    if measured.carried is not None:
        carried = measured.carried
        lines.append(
            f"The rest was carried over from {carried.source}: {carried.probes} pieces were "
            f"measured on both, and tell each other within {carried.error:.0%} (median; worst "
            f"{carried.worst:.0%})."
        )
    found = measured.interference
    if found is not None and found.disturbed:
        lines.append(f"DISTURBED: {'; '.join(found.reasons)}. Measure again on a quiet machine.")
    return "\n".join(lines)


def _line(cost: PieceCost) -> str:
    piece, ms = cost.piece, cost.ms
    return (
        f"{piece.kind:<12}{cost.precision:<10}{piece.width:>6}{piece.positions:>10}"
        f"{ms.value:>10.4f}  [{ms.low:.4f}, {ms.high:.4f}]"
    )


def _checks(measured: MeasuredDevice) -> list[str]:
    predictor = Predictor(measured)
    lines = []
    for precision in measured.precisions:
        found = predictor.checks(precision)
        if not found:
            continue
        errors = [abs(predicted / ms - 1) for predicted, ms in found]
        towers = "tower" if len(errors) == 1 else "towers"
        lines.append(
            f"{len(errors)} whole {towers} in {precision}: predicted within "
            f"{statistics.median(errors):.1%} (median; worst {max(errors):.1%})"
        )
    return lines
