"""What to try next, where the measurements support it: at most three things."""

from collections.abc import Callable, Sequence

from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.machine import Machine
from edgeclip.runtime.inspecting.advice_case import Advice, Case
from edgeclip.runtime.inspecting.advice_conditions import measure_again
from edgeclip.runtime.inspecting.advice_ends import prebuilt_engine, smaller_pictures
from edgeclip.runtime.inspecting.advice_layers import (
    islands,
    short_layers,
    smaller_model,
    smaller_weights,
)
from edgeclip.runtime.inspecting.advice_settings import (
    batch_of_one,
    faster_precision,
    larger_batch,
    other_threads,
    spinning_threads,
)
from edgeclip.runtime.inspecting.roofline import Roofline
from edgeclip.runtime.inspecting.roofline_distance import LayerDistance
from edgeclip.runtime.measuring.measurement import Measurement, MeasurementRun

MOST = 3
_WORTH = 0.05  # of latency, throughput and so on; less is not worth a sentence
# Where two rules have the same topic, the earlier one knows more.
_RULES: tuple[Callable[[Case], Advice | None], ...] = (
    smaller_pictures,
    other_threads,
    spinning_threads,
    larger_batch,
    batch_of_one,
    faster_precision,
    smaller_model,
    smaller_weights,
    short_layers,
    islands,
    prebuilt_engine,
)


def advise(
    measurement: Measurement,
    roofline: Roofline | None,
    distances: Sequence[LayerDistance],
    device: DeviceProfile,
    machine: Machine,
    run: MeasurementRun,
) -> tuple[Advice, ...]:
    """At most three things to try, the largest possible gain first; none where none is sure.

    Whether the figures can be believed comes before everything else. Each rule states its
    condition where it is written. Gains are bounds (Amdahl's law, ratios of what was
    measured), not promises, and they do not add up.

    Args:
        measurement: what the advice is about.
        roofline: of the machine; None if it was not measured.
        distances: of the measurement's layers (see `distances`); empty if there are none.
        device: that ran it.
        machine: that ran it.
        run: that the measurement is of; its other measurements are compared with.
    """
    case = Case(
        measurement=measurement,
        roofline=roofline,
        distances=tuple(distances),
        device=device,
        machine=machine,
        run=run,
    )
    first = measure_again(case)
    by_topic: dict[str, Advice] = {}
    for rule in _RULES:
        advice = rule(case)
        if advice is not None and advice.saves >= _WORTH:
            by_topic.setdefault(advice.topic, advice)
    ranked = sorted(by_topic.values(), key=lambda item: -item.saves)
    return tuple([*([first] if first else []), *ranked][:MOST])
