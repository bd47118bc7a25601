"""The parts of `benchmarks/card.py`, the suite for a GPU."""
