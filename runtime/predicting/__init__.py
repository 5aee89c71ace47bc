"""Predicting: how fast a tower would be that was never run on a device."""
