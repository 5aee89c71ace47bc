"""The errors that EdgeCLIP raises. Each message says what is wrong and how to fix it."""

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class EdgeClipError(Exception):
    """Base class of all errors that the user can fix, and of what a machine lacks."""


class ConfigError(EdgeClipError):
    """A setting, or a file of settings such as a device profile, that is not valid."""


class InputError(EdgeClipError):
    """An image, text, array or option that cannot be used."""


class BundleError(EdgeClipError):
    """A directory that is not a complete, unmodified bundle of a supported schema version."""


class SpaceMismatchError(EdgeClipError):
    """Embeddings of two different embedding spaces cannot be compared."""


class EngineError(EdgeClipError):
    """An inference engine is missing, or it cannot load or run a graph."""


class EngineParityError(EngineError):
    """An engine that loads and runs, but whose outputs differ from those of its graph."""


class MissingExtraError(EdgeClipError):
    """A Python package is missing that an optional extra of EdgeCLIP installs."""


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, or its class if it is empty."""
    return (without_colour(str(error)).strip().splitlines() or [type(error).__name__])[0]


def without_colour(text: str) -> str:
    """Remove the colour codes that another program or library put into its message."""
    return _COLOUR.sub("", text)
