"""Errors of the export; each message says what was wrong and how to mend it."""

from edgeclip.runtime.errors import EdgeClipError


class ExportError(EdgeClipError):
    """A model that cannot be turned into a graph, or a graph that is not what it should be."""


class GateError(EdgeClipError):
    """A quality bound was missed, so no bundle was written."""
