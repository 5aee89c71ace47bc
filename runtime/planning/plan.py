"""SplitPlan: what runs where for one picture, as data with a JSON round trip."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from edgeclip.profiles.errors import ConfigError
from edgeclip.profiles.ranges import Range, check_ranges
from edgeclip.profiles.schema import parse
from edgeclip.runtime.files import atomic_file

SCHEMA_VERSION = 1
PlanKind = Literal["device", "image", "embedding", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
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

    def to_json(self) -> str:
        """This plan as indented JSON; `from_json` gives an equal one back."""
        data = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, *, source: str) -> "SplitPlan":
        """Read what `to_json` wrote; `source` names it in messages.

        Raises:
            ConfigError: not JSON, another schema version, or not a plan.
        """
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON: {error}") from None
        version = data.pop("schema_version", None) if isinstance(data, dict) else None
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ConfigError(
                f"{source}: plan schema {version!r} is not {SCHEMA_VERSION}: make it again with "
                "`edgeclip plan`"
            )
        return parse(SplitPlan, data, source=source)

    def save(self, path: Path) -> None:
        """Write `to_json` to `path`, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "SplitPlan":
        """Read what `save` wrote.

        Raises:
            ConfigError: missing, unreadable or invalid file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text: {error}") from None
        return SplitPlan.from_json(text, source=str(path))
