"""Sensing: clocks, heat, energy and memory of this machine, and what else it does."""
