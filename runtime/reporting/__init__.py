"""Reporting: what was made and measured, as one HTML page."""
