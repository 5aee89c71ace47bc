"""Errors of the runtime; each message says what was wrong and how to mend it."""

from edgeclip.profiles.errors import ConfigError, EdgeClipError

__all__ = [
    "BundleError",
    "ConfigError",
    "EdgeClipError",
    "EngineError",
    "EngineParityError",
    "InputError",
    "MissingExtraError",
    "SpaceMismatchError",
    "first_line",
]


class InputError(EdgeClipError):
    """An image, text, array or option that cannot be used."""


class BundleError(EdgeClipError):
    """A directory that is not a whole, unaltered bundle of a known schema."""


class SpaceMismatchError(EdgeClipError):
    """Embeddings of two different embedding spaces were about to be compared."""


class EngineError(EdgeClipError):
    """An inference engine is missing, or cannot load or run a graph."""


class EngineParityError(EngineError):
    """An engine that loads and runs, but does not compute what its graph computes."""


class MissingExtraError(EdgeClipError):
    """A command needs packages that the installed extras do not bring."""


def first_line(error: Exception) -> str:
    """The first line of what another library's error says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
