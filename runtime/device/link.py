"""LinkProfile: latency, bandwidth and loss of the network between a device and a server."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from edgeclip.runtime.device.schema import builtin_names, check_bounds, load_profile


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """A network link, seen from the device.

    Attributes:
        name: a short name.
        description: one line for a person.
        rtt_ms: round-trip time of a small packet on an idle link, median.
        up_mbps: from device to server, 10^6 bits per second of payload.
        down_mbps: from server to device, likewise.
        loss: share of packets lost, 0 to below 1.
        jitter_ms: standard deviation of the round-trip time.

    Raises:
        ValueError: a value out of bounds; all of them in one message.
    """

    name: str
    description: str
    rtt_ms: Annotated[float, Ge(0)]
    up_mbps: Annotated[float, Gt(0)]
    down_mbps: Annotated[float, Gt(0)]
    loss: Annotated[float, Ge(0), Lt(1)]
    jitter_ms: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.name.strip():
            raise ValueError("name must not be empty")


def load_link(name_or_path: str | Path) -> LinkProfile:
    """Load a built-in link by name, or a YAML file by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or a bad file.
    """
    return load_profile(LinkProfile, "links", name_or_path)


def link_names() -> tuple[str, ...]:
    """Return the names of the built-in links."""
    return builtin_names("links")
