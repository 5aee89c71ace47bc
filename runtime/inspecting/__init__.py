"""Inspecting: where the time of a tower goes, how far it is from what is possible, what to try."""
