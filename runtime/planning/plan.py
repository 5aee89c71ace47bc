"""Split plans: what runs on the device and on the server for one picture; list all plans."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from edgeclip.runtime.bundle.files import JsonRecord
from edgeclip.runtime.device.schema import check_bounds
from edgeclip.runtime.planning.cut_set import CutManifest, tail_model_name
from edgeclip.runtime.planning.stage_times import Payload, SplitStage, StageTimes
from edgeclip.runtime.wire.codec import FILE

PlanKind = Literal["device", "image", "embedding", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan(JsonRecord):
    """Which work runs on the device and on the server, and what crosses the network.

    Attributes:
        name: readable name, such as "cut 3 (after block 1), int8".
        kind: "device" runs the whole tower and sends nothing; "image" sends the picture;
            "embedding" runs the whole tower and sends its result to a search or label model;
            "cut" runs the tower up to a cut.
        model: the server's model that is called; None for "device".
        codec: how the picture or the value at the cut becomes bytes, see `codec.CodecName` and
            `codec.encode_picture`; None for "device" and "embedding".
        cut: number of the cut point; only for "cut", where 0 sends the pixels as they are.
        deadline_ms: latency within which an answer is needed; None for no bound.
        space: fingerprint of the embedding space, 64 hexadecimal digits.
        p50_ms, p95_ms: predicted; None for a plan that was written by hand. p95 is what the next
            request keeps with 95%; of fewer than 19 measured rounds it is the slowest.
        bytes_p95: predicted size of a request's body; None likewise.

    Raises:
        ValueError: fields that contradict each other; all of them in one message.
    """

    WHAT: ClassVar[str] = "a plan"
    HINT: ClassVar[str] = "make it again with `edgeclip plan`"

    name: str
    kind: PlanKind
    space: str
    model: str | None = None
    codec: str | None = None
    cut: Annotated[int | None, Ge(0)] = None
    deadline_ms: Annotated[float | None, Gt(0)] = None
    p50_ms: Annotated[float | None, Ge(0)] = None
    p95_ms: Annotated[float | None, Ge(0)] = None
    bytes_p95: Annotated[int | None, Ge(0)] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        given = {
            "model": (self.model, self.kind != "device"),
            "codec": (self.codec, self.kind in ("image", "cut")),
            "cut": (self.cut, self.kind == "cut"),
        }
        mistakes = [
            f"{key} is {'needed' if needed else 'not'} for a plan of kind {self.kind!r}"
            for key, (value, needed) in given.items()
            if (value is not None) is not needed
        ]
        if mistakes:
            raise ValueError("; ".join(mistakes))


Goal = Literal["embedding", "search"]

_PREPARE, _WHOLE = SplitStage(kind="prepare"), SplitStage(kind="tail", cut=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCandidate:
    """A plan, the stages that each side runs for it, and what crosses the network.

    Attributes:
        plan: without a prediction.
        device, encode: stages of the device.
        decode, server: stages of the server.
        payload: what crosses; None for an embedding.
        asks: whether the server is called at all.
        searches: whether a second request sends the embedding to a search.
    """

    plan: SplitPlan
    device: tuple[SplitStage, ...] = ()
    encode: tuple[SplitStage, ...] = ()
    decode: tuple[SplitStage, ...] = ()
    server: tuple[SplitStage, ...] = ()
    payload: Payload | None = None
    asks: bool = True
    searches: bool = False


def list_candidates(
    manifest: CutManifest,
    device: StageTimes,
    *,
    goal: Goal = "embedding",
    index: str = "index",
    deadline_ms: float | None = None,
) -> tuple[PlanCandidate, ...]:
    """List all plans: the device alone, and everything that can be sent in every codec.

    Args:
        manifest: manifest of the cut set.
        device: stage times of the device; a plan is listed for each measured payload.
        goal: an "embedding" on the device, or the hits of a "search" in an index of the server.
            The index may lie on the device too, so the device alone is always a candidate; its
            search is assumed to cost as much as the server's, and both are left out.
        index: the server's index model.
        deadline_ms: deadline of every plan.
    """
    alone = SplitPlan(
        name="device only", kind="device", space=manifest.space, deadline_ms=deadline_ms
    )
    found = [PlanCandidate(plan=alone, device=(_PREPARE, _WHOLE), asks=False)]
    if goal == "search":
        plan = dataclasses.replace(alone, name="send the embedding", kind="embedding", model=index)
        found.append(PlanCandidate(plan=plan, device=(_PREPARE, _WHOLE)))
    for payload in device.payloads:
        if payload.cut is None:
            made = _of_picture(alone, manifest, payload)
        else:
            made = _of_cut(alone, manifest, payload, payload.cut)
        found.append(dataclasses.replace(made, searches=goal == "search"))
    return tuple(found)


def _of_picture(alone: SplitPlan, manifest: CutManifest, payload: Payload) -> PlanCandidate:
    codec = payload.codec
    what = "the file as it is" if codec == FILE else f"the picture, {codec}"
    return PlanCandidate(
        plan=dataclasses.replace(
            alone,
            name=f"send {what}",
            kind="image",
            model=f"{manifest.bundle}-image",
            codec=codec,
        ),
        encode=(SplitStage(kind="compress", codec=codec),),
        decode=(SplitStage(kind="open", codec=codec),),
        server=(_WHOLE,),
        payload=payload,
    )


def _of_cut(
    alone: SplitPlan, manifest: CutManifest, payload: Payload, number: int
) -> PlanCandidate:
    codec = payload.codec
    where = next(point.name for point in manifest.points if point.number == number)
    name = f"cut {number} ({where}), {codec}" if number else f"send the pixels, {codec}"
    return PlanCandidate(
        plan=dataclasses.replace(
            alone,
            name=name,
            kind="cut",
            model=tail_model_name(manifest.bundle, number),
            codec=codec,
            cut=number,
        ),
        device=(_PREPARE, SplitStage(kind="head", cut=number)) if number else (_PREPARE,),
        encode=(SplitStage(kind="encode", cut=number, codec=codec),),
        decode=(SplitStage(kind="decode", cut=number, codec=codec),),
        server=(SplitStage(kind="tail", cut=number),),
        payload=payload,
    )
