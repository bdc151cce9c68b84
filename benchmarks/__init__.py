"""Measurements: `measure` (peak bytes, time, the machine); `cpu`, `kv`, `starts` and `gpu` (docs/figures.md)."""
