"""Example programs. Each module runs with `python -m examples.NAME`."""
