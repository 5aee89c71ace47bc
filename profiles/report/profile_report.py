"""The report of a profile: one HTML page that needs no network, and Markdown for a pull request."""

from collections.abc import Sequence
from pathlib import Path

from edgeclip.profiles.report.html_page import render_sections, write_page
from edgeclip.profiles.report.profile_blocks import AdviceList, Section
from edgeclip.profiles.report.profile_cost import (
    ENERGY_KEYS,
    MEMORY_KEYS,
    energy_section,
    start_section,
)
from edgeclip.profiles.report.profile_data import (
    AdviceNote,
    NamedRun,
    Subject,
    SubjectQuality,
    subjects_of,
)
from edgeclip.profiles.report.profile_environment import (
    absent_section,
    environment_section,
    identity_section,
    repeat_section,
)
from edgeclip.profiles.report.profile_inside import (
    LAYER_KEYS,
    STAGE_KEYS,
    layer_section,
    stage_section,
)
from edgeclip.profiles.report.profile_quality import quality_section
from edgeclip.profiles.report.profile_speed import (
    SCENARIO_KEYS,
    histogram_section,
    latency_section,
    ratio_section,
    scenario_section,
)
from edgeclip.profiles.report.profile_spread import spread_section
from edgeclip.profiles.report.profile_summary import summary_of
from edgeclip.profiles.report.profile_sweep import sweep_section
from edgeclip.runtime.errors import InputError

_CLAIMED = (*MEMORY_KEYS, *ENERGY_KEYS, *STAGE_KEYS, *LAYER_KEYS, *SCENARIO_KEYS)


def write_profile_report(
    runs: Sequence[NamedRun],
    out: Path,
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> None:
    """Write the page to `out`, whole or not at all.

    Args:
        runs: at least one; their subjects stand side by side.
        out: the HTML file.
        quality: of the subjects, such as `quality_of_bundle` gives.
        advice: what is worth trying, the most promising first.

    Raises:
        InputError: no run, or the file cannot be written.
        MissingExtraError: jinja2 is not installed.
    """
    write_page(render_profile_report(runs, quality=quality, advice=advice), out)


def render_profile_report(
    runs: Sequence[NamedRun],
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> str:
    """The page as HTML text; whatever comes from files is escaped.

    Raises:
        InputError: no run.
        MissingExtraError: jinja2 is not installed.
    """
    if not runs:
        raise InputError("a report needs a measurement: give a file of `edgeclip profile --out`")
    subjects = subjects_of(runs)
    return render_sections(
        title=title_of(subjects),
        lead=_lead(runs),
        summary=summary_of(runs, subjects, quality),
        sections=sections_of(runs, quality=quality, advice=advice),
        created=max(source.run.created for source in runs),
    )


def sections_of(
    runs: Sequence[NamedRun],
    *,
    quality: Sequence[SubjectQuality] = (),
    advice: Sequence[AdviceNote] = (),
) -> tuple[Section, ...]:
    """The sections that have something to show, in the order of the page."""
    subjects = subjects_of(runs)
    found = (
        quality_section(subjects, quality),
        latency_section(subjects),
        histogram_section(subjects),
        ratio_section(subjects),
        scenario_section(subjects),
        sweep_section(subjects),
        start_section(subjects),
        energy_section(subjects),
        stage_section(subjects),
        layer_section(subjects),
        _advice(advice),
        spread_section(runs, subjects),
        absent_section(subjects, _CLAIMED),
        identity_section(subjects),
        environment_section(runs),
        repeat_section(runs),
    )
    return tuple(section for section in found if section is not None)


def title_of(subjects: Sequence[Subject]) -> str:
    """Names what was measured, as far as identities tell."""
    bundles = dict.fromkeys(s.item.identity.bundle for s in subjects if s.item.identity is not None)
    return f"Profile of {', '.join(bundles)}" if bundles else "Profile"


def _lead(runs: Sequence[NamedRun]) -> list[str]:
    """Machine and time of each run in a sentence."""
    return [
        f"{source.name}: {source.run.machine.cpu or 'an unknown processor'}, "
        f"{source.run.machine.cores} cores, {source.run.machine.os}, measured {source.run.created}."
        for source in runs
    ]


def _advice(advice: Sequence[AdviceNote]) -> Section | None:
    if not advice:
        return None
    return Section(
        anchor="advice", title="What is worth trying", blocks=(AdviceList(tuple(advice)),)
    )
