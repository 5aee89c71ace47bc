"""Comparing: two runs of measurements, and whether one of them is surely slower."""
