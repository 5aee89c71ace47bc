"""Errors that EdgeCLIP raises on purpose; each message says what was wrong and how to mend it."""


class EdgeClipError(Exception):
    """Base class: a mistake that the user can mend, or a machine that lacks something."""


class ConfigError(EdgeClipError):
    """A setting, profile or file of settings that is not valid."""


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
