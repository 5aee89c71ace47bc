"""Every plan that a cut set allows, and what each side does in it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from edgeclip.runtime.planning.cut_head import tail_model
from edgeclip.runtime.planning.cut_set import CutManifest
from edgeclip.runtime.planning.plan import SplitPlan
from edgeclip.runtime.planning.stage_times import Payload, Stage, StageTimes
from edgeclip.runtime.wire.codec_image import FILE

Goal = Literal["embedding", "search"]

_PREPARE, _WHOLE = Stage(kind="prepare"), Stage(kind="tail", cut=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan, the stages that each side runs for it, and what crosses.

    Attributes:
        plan: without a prediction.
        device, encode: stages of the device.
        decode, server: stages of the server.
        payload: what crosses, but for an embedding.
        asks: whether the server is asked at all.
        searches: whether a second request takes the embedding to a search.
    """

    plan: SplitPlan
    device: tuple[Stage, ...] = ()
    encode: tuple[Stage, ...] = ()
    decode: tuple[Stage, ...] = ()
    server: tuple[Stage, ...] = ()
    payload: Payload | None = None
    asks: bool = True
    searches: bool = False


def all_candidates(
    manifest: CutManifest,
    device: StageTimes,
    *,
    goal: Goal = "embedding",
    index: str = "index",
    deadline_ms: float | None = None,
) -> tuple[Candidate, ...]:
    """List the device alone, and each thing that can cross in each codec.

    Args:
        manifest: of the cut set.
        device: its payloads say what was measured.
        goal: an "embedding" is wanted on the device, or the hits of a "search" in an index of
            the server. The index may lie on the device too, so the device alone is always
            there; its search is taken to cost what the server's does, and both are left out.
        index: the server's model that is asked for hits.
        deadline_ms: of every plan.
    """
    alone = SplitPlan(
        name="device only", kind="device", space=manifest.space, deadline_ms=deadline_ms
    )
    found = [Candidate(plan=alone, device=(_PREPARE, _WHOLE), asks=False)]
    if goal == "search":
        plan = dataclasses.replace(alone, name="send the embedding", kind="embedding", model=index)
        found.append(Candidate(plan=plan, device=(_PREPARE, _WHOLE)))
    for payload in device.payloads:
        if payload.cut is None:
            made = _of_picture(alone, manifest, payload)
        else:
            made = _of_cut(alone, manifest, payload, payload.cut)
        found.append(dataclasses.replace(made, searches=goal == "search"))
    return tuple(found)


def _of_picture(alone: SplitPlan, manifest: CutManifest, payload: Payload) -> Candidate:
    codec = payload.codec
    what = "the file as it is" if codec == FILE else f"the picture, {codec}"
    return Candidate(
        plan=dataclasses.replace(
            alone,
            name=f"send {what}",
            kind="image",
            model=f"{manifest.bundle}-image",
            codec=codec,
        ),
        encode=(Stage(kind="compress", codec=codec),),
        decode=(Stage(kind="open", codec=codec),),
        server=(_WHOLE,),
        payload=payload,
    )


def _of_cut(alone: SplitPlan, manifest: CutManifest, payload: Payload, number: int) -> Candidate:
    codec = payload.codec
    where = next(point.name for point in manifest.points if point.number == number)
    name = f"cut {number} ({where}), {codec}" if number else f"send the pixels, {codec}"
    return Candidate(
        plan=dataclasses.replace(
            alone,
            name=name,
            kind="cut",
            model=tail_model(manifest.bundle, number),
            codec=codec,
            cut=number,
        ),
        device=(_PREPARE, Stage(kind="head", cut=number)) if number else (_PREPARE,),
        encode=(Stage(kind="encode", cut=number, codec=codec),),
        decode=(Stage(kind="decode", cut=number, codec=codec),),
        server=(Stage(kind="tail", cut=number),),
        payload=payload,
    )
