"""Quantizing: the fastest form of a tower that stays inside its gates, and the proof of it."""
