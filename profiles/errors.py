"""The root of every error that EdgeCLIP raises on purpose.

A message says what was wrong and how to mend it; the command line prints it as one
line, without a traceback.
"""


class EdgeClipError(Exception):
    """Base class: a mistake that the user can mend, or a machine that lacks something."""


class ConfigError(EdgeClipError):
    """A setting, profile or file of settings that is not valid."""
