"""Stage times as a table for a terminal."""

import numpy as np

from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.planning.stage_times import Payload, Stage, StageTimes
from edgeclip.runtime.reporting.report_format import digits
from edgeclip.runtime.text_columns import columns


def stage_table(times: StageTimes, manifest: CutManifest) -> str:
    """Medians of every stage, bytes and cosines of every codec, and warnings."""
    cuts = [("cut", "where", "head ms", "tail ms")]
    for point in manifest.points:
        head = times.find(Stage(kind="head", cut=point.number))
        tail = times.ms(Stage(kind="tail", cut=point.number))
        before = "" if head is None else _median(np.array(head.ms))
        cuts.append((str(point.number), point.name, before, _median(tail)))
    what = f"{times.rounds} rounds over {times.pictures} pictures, batch 1; medians"
    head_line = f"{times.machine.cpu}, {times.machine.cores} cores, device {times.device}; {what}"
    codecs: list[tuple[str, ...]] = [
        ("sent", "codec", "send ms", "receive ms", "bytes", "p95", "cosine", "least")
    ]
    codecs += [_codec_row(times, payload) for payload in times.payloads]
    parts = [head_line, columns(cuts, left=2), columns(codecs, left=2)]
    if times.contended:
        parts.append(
            "CONTENDED: more than 10% of the CPU time was denied to these runs: measure again on "
            "a quiet machine."
        )
    if times.energy_sensor is None:
        parts.append("No energy counter can be read here: energy is left out.")
    return "\n\n".join(parts)


def _codec_row(times: StageTimes, payload: Payload) -> tuple[str, ...]:
    if payload.cut is None:
        sending = Stage(kind="compress", codec=payload.codec)
        receiving = Stage(kind="open", codec=payload.codec)
    else:
        sending = Stage(kind="encode", cut=payload.cut, codec=payload.codec)
        receiving = Stage(kind="decode", cut=payload.cut, codec=payload.codec)
    return (
        "picture" if payload.cut is None else f"cut {payload.cut}",
        payload.codec,
        _median(times.ms(sending)),
        _median(times.ms(receiving)),
        f"{np.median(payload.bytes):,.0f}",
        f"{np.percentile(payload.bytes, 95):,.0f}",
        f"{np.mean(payload.cosines):.5f}",
        f"{min(payload.cosines):.5f}",
    )


def _median(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    return digits(float(np.median(values)))
