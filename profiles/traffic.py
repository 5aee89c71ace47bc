"""Traffic: how requests come to a server, and what has to hold while they do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from edgeclip.profiles.builtin_profiles import builtin_names, load_profile
from edgeclip.profiles.ranges import Range, check_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Open-loop traffic with its service level.

    Requests are sent at times that were drawn before, whether or not earlier ones were
    answered; latency counts from there, so that a server which stalls cannot hide it
    (G. Tene, "How NOT to Measure Latency", 2013).

    Attributes:
        name: a short name.
        description: one line for a person.
        requests_per_second: the mean rate.
        arrivals: "poisson", independent of each other, or "even", at equal distances.
        seconds: how long it lasts.
        link: name of the `LinkProfile` between device and server, or a YAML file.
        deadline_ms: of each request.
        p99_ms: the service level's 99th percentile of latency.
        answered: the least share of requests that must be answered, 0 to 1.

    Raises:
        ValueError: a value out of bounds; all of them in one message.
    """

    name: str
    description: str
    requests_per_second: Annotated[float, Range(above=0)]
    arrivals: Literal["poisson", "even"]
    seconds: Annotated[float, Range(above=0)]
    link: str
    deadline_ms: Annotated[float, Range(above=0)]
    p99_ms: Annotated[float, Range(above=0)]
    answered: Annotated[float, Range(at_least=0)]

    def __post_init__(self) -> None:
        check_ranges(self)
        mistakes = [f"{key} must not be empty" for key in ("name", "link") if not self._has(key)]
        if self.answered > 1:
            mistakes.append(f"answered is a share, at most 1, got {self.answered}")
        if mistakes:
            raise ValueError("; ".join(mistakes))

    def _has(self, key: str) -> bool:
        return bool(str(getattr(self, key)).strip())


def load_traffic(name_or_path: str | Path) -> Traffic:
    """Built-in traffic by name, or a YAML file by path.

    Raises:
        ConfigError: an unknown name (the message lists the known ones) or a bad file.
    """
    return load_profile(Traffic, "traffic", name_or_path)


def traffic_names() -> tuple[str, ...]:
    """Names of the built-in traffic."""
    return builtin_names("traffic")
