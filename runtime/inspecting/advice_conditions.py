"""Advice before all other: whether the figures can be believed at all."""

from edgeclip.runtime.inspecting.advice_case import Advice, Case, percent

MEASURE_AGAIN = "measure again"


def measure_again(case: Case) -> Advice | None:
    """The run, this measurement or the roofline was made on a machine that was not at rest.

    That is: the run or its roofline was disturbed or throttled; the measurement contended or never
    warm; layers computed faster than the peak. What cannot be told (None) is no reason.
    """
    reasons = [*_of_the_run(case), *_of_the_measurement(case), *_of_the_roofline(case)]
    if not reasons:
        return None
    return Advice(
        topic=MEASURE_AGAIN,
        what="Measure again before you believe anything: close what else runs, let the machine "
        "cool, and repeat the command of this run",
        evidence="; ".join(dict.fromkeys(reasons)),
        gains="certainty",
        at_most=None,
    )


def _of_the_run(case: Case) -> list[str]:
    found = case.run.interference
    if found is None:
        return []
    reasons = list(found.reasons) if found.disturbed or found.throttled else []
    if found.throttled and not reasons:
        reasons.append("a processor was slowed for its heat or supply")
    return reasons or (["other work disturbed the run"] if found.disturbed else [])


def _of_the_measurement(case: Case) -> list[str]:
    item, reasons = case.measurement, []
    if item.contended:
        shares = {"waiting": item.cpu.waiting_share, "stolen": item.cpu.steal_share}
        known = [f"{percent(share)} {name}" for name, share in shares.items() if share is not None]
        told = f": {', '.join(known)}" if known else ""
        reasons.append(f"processor time was denied to {item.name}{told}")
    if not item.warm_up.settled:
        reasons.append(
            f"the median still moved after {item.warm_up.runs} runs: raise max_warmup_seconds "
            "in the workload"
        )
    return reasons


def _of_the_roofline(case: Case) -> list[str]:
    roof, above = case.roofline, case.above_the_roof()
    found = None if roof is None else roof.interference
    reasons = [] if found is None else [f"{why} while peaks were measured" for why in found.reasons]
    if above is not None:
        reasons.append(f"layers computed {above:.1f} times as fast as the peak that was measured")
    return reasons
