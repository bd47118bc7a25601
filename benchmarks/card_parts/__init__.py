"""The parts of `benchmarks/card.py`, the measurements on a GPU."""
