"""Measurements: `measure` (peak bytes, time, the machine), `cpu`, `kv` and `gpu` (the figures in docs/figures.md), `starts`."""
