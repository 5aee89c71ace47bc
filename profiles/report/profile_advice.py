"""What to try next, from the measurements of runs, as their report shows it."""

from collections.abc import Sequence

from edgeclip.profiles.layers.advice import MEASURE_AGAIN, Advice, advise
from edgeclip.profiles.layers.roofline import LayerDistance, distances
from edgeclip.profiles.record.measurement import Measurement, MeasurementRun
from edgeclip.profiles.report.profile_data import AdviceNote, NamedRun


def advice_of(runs: Sequence[NamedRun]) -> tuple[AdviceNote, ...]:
    """Notes for each subject of each run that says on which device it was made."""
    notes: dict[tuple[str, str], AdviceNote] = {}
    for source in runs:
        where = "" if len(runs) == 1 else f" · {source.name}"
        for item in source.run.measurements:
            for advice in _advice(source.run, item):
                # To measure again is about the whole run, and said once.
                of_all = advice.topic == MEASURE_AGAIN
                subject = "all subjects" if of_all else f"{item.name} ({item.part})"
                note = _note(f"{subject}{where}", advice)
                notes.setdefault((note.subject, advice.topic), note)
    return tuple(notes.values())


def _advice(run: MeasurementRun, item: Measurement) -> tuple[Advice, ...]:
    if run.device is None:
        return ()
    return advise(item, run.roofline, _distances(run, item), run.device, run.machine, run)


def _distances(run: MeasurementRun, item: Measurement) -> tuple[LayerDistance, ...]:
    precision = None if item.identity is None else item.identity.precision
    if run.roofline is None or item.layers is None or precision is None:
        return ()
    return distances(item.layers, run.roofline, precision)


def _note(subject: str, advice: Advice) -> AdviceNote:
    best = "" if advice.at_most is None else f"{advice.gains}: at most {advice.at_most:.2f} ×"
    return AdviceNote(
        subject=subject, title=advice.what, text="", evidence=(advice.evidence,), gain=best
    )
