"""Benchmarks: `operators.py` and `transfer_step.py` are commands, the rest is what they share."""
