"""Compress: teachers, students, and the training of one from the other."""

import edgeclip.runtime  # noqa: F401  (first of all: it switches off telemetry)
