"""Profiles: descriptions of devices, links and workloads, measurements, comparisons, reports."""
