"""Measurements behind every published figure. Each module is a command: `python -m benchmarks.<name> --help`."""
