"""Robust learned optimizers: the reference implementation of "Learning to Learn from Mistakes:
Robust Optimization for Adversarial Noise" (Serban, Poll and Visser)."""

__version__ = "0.1.0"
