"""SplitPlan: what runs where for one picture, as data with a JSON round trip."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from edgeclip.profiles.ranges import Range, check_ranges
from edgeclip.runtime.json_record import JsonRecord

PlanKind = Literal["device", "image", "embedding", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan(JsonRecord):
    """Who does what, and what crosses the network.

    Attributes:
        name: for a person, such as "cut 3 (after block 1), int8".
        kind: "device" runs the whole tower and sends nothing; "image" sends the picture;
            "embedding" runs the whole tower and sends its result to a search or label model;
            "cut" runs the tower up to a cut.
        model: the server's model that is asked; None for "device".
        codec: how what crosses becomes bytes, see `codec.CodecName` and
            `codec_image.ImageCodecName`; None for "device" and "embedding".
        cut: number of the cut point; only for "cut", where 0 sends the pixels as they are.
        deadline_ms: when an answer must be there; None for no bound.
        space: fingerprint of the embedding space, 64 hexadecimal digits.
        p50_ms, p95_ms: predicted; None for a plan that was written by hand.
        bytes_p95: of a request's body; None likewise.

    Raises:
        ValueError: fields that contradict each other; all of them in one message.
    """

    WHAT: ClassVar[str] = "a plan"
    MEND: ClassVar[str] = "make it again with `edgeclip plan`"

    name: str
    kind: PlanKind
    space: str
    model: str | None = None
    codec: str | None = None
    cut: Annotated[int | None, Range(at_least=0)] = None
    deadline_ms: Annotated[float | None, Range(above=0)] = None
    p50_ms: Annotated[float | None, Range(at_least=0)] = None
    p95_ms: Annotated[float | None, Range(at_least=0)] = None
    bytes_p95: Annotated[int | None, Range(at_least=0)] = None

    def __post_init__(self) -> None:
        check_ranges(self)
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
