"""Export: from a student's weights to a verified bundle."""

import edgeclip.runtime  # noqa: F401  (first of all: it switches off telemetry)
