"""Measuring: latency, throughput, memory and energy, and whether the figures can be trusted."""
