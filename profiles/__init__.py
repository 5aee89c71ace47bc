"""Profiles: descriptions of devices, links and workloads, measurements, comparisons, reports."""

import edgeclip.runtime  # noqa: F401  (first of all: it switches off telemetry)
