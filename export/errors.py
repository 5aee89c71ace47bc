"""Errors of the export; each message says what is wrong and how to fix it."""

from edgeclip.runtime.errors import EdgeClipError


class ExportError(EdgeClipError):
    """A model that cannot be exported, or a graph that is not valid."""


class GateError(EdgeClipError):
    """A quality gate was missed, so no bundle was written."""
