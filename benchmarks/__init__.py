"""Measurements: `measure` (peak bytes, time, the machine), `cpu` and `gpu` (the figures in the README)."""
