"""A search as one HTML page that needs no network: the picture, every config, the proof."""

from datetime import UTC, datetime
from pathlib import Path

from edgeclip.export.quantizing.damage_section import damage_section
from edgeclip.export.quantizing.point import MEAN_COSINE, R1_LOSS, measured
from edgeclip.export.quantizing.search import SearchResult
from edgeclip.export.quantizing.search_sections import (
    SearchedTower,
    failed_section,
    front_section,
    judged_section,
    method_section,
    points_section,
)
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.reporting.html_page import render_sections, write_page
from edgeclip.runtime.reporting.profile_summary import Alarm, Card, Summary
from edgeclip.runtime.reporting.report_format import digits, megabytes, seconds


def search_page(result: SearchResult, path: Path, about: SearchedTower) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        InputError: it cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    write_page(render_search(result, about), path)


def render_search(result: SearchResult, about: SearchedTower) -> str:
    """The page as HTML text; whatever comes from files is escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return render_sections(
        title=about.title,
        lead=_lead(result, about),
        summary=_summary(result),
        sections=(
            front_section(result),
            points_section(result),
            judged_section(result),
            damage_section(result),
            failed_section(result),
            method_section(about),
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _lead(result: SearchResult, about: SearchedTower) -> tuple[str, ...]:
    spent = seconds(sum(point.seconds for point in result.points))
    where = f"Times are from {about.here}." if about.here else "No time was measured."
    return (f"{len(result.points)} configs were made and judged in {spent}. {where}",)


def _summary(result: SearchResult) -> Summary:
    chosen, fp32 = result.chosen, result.points[0]
    if chosen.key == fp32.key:
        return Summary(f"Only fp32 is to be shipped: {result.why}.", "", _alarms(result), ())
    cards = [Card("Size", megabytes(chosen.bytes), f"fp32 {megabytes(fp32.bytes)}", chosen.name)]
    if chosen.latency is not None:
        ratio, latency = chosen.latency.ratio, chosen.latency
        note = f"{digits(latency.ms.value)} ms, fp32 {digits(latency.reference_ms.value)} ms"
        cards.insert(0, _card("Time, fp32 is 1", ratio, 3, note))
    last = result.judged[-1].records
    for gate, title, places in (
        (MEAN_COSINE, "Mean cosine with fp32", 5),
        (R1_LOSS, "R@1 lost, points", 2),
    ):
        value = measured(last, gate)
        if value is not None:
            cards.append(_card(title, value, places, "on the test pairs"))
    verdict = f"{chosen.name}: {result.why}. On the test pairs it is inside them too."
    return Summary(verdict, "pass", _alarms(result), tuple(cards))


def _card(name: str, value: Interval, places: int, note: str) -> Card:
    span = f"{value.low:.{places}f} to {value.high:.{places}f}"
    return Card(name, f"{value.value:.{places}f}", span, note)


def _alarms(result: SearchResult) -> tuple[Alarm, ...]:
    alarms = []
    if not result.complete:
        alarms.append(Alarm("Time was up before all was tried: run it again to go on.", "miss"))
    disturbed = [point for point in result.points if point.latency and point.latency.contended]
    if disturbed:
        alarms.append(
            Alarm(
                f"{len(disturbed)} of {len(result.points)} configs were timed while other programs "
                "took the processor: their intervals are wide.",
                "miss",
            )
        )
    if len(result.judged) > 1:
        words = f"{len(result.judged)} configs were held against the test pairs, each once."
        alarms.append(Alarm(words, ""))
    return tuple(alarms)
