"""Measurements: `measure` (peak bytes, time, the machine) and one module for each section of docs/figures.md."""
