"""Benchmarks of xlsd_train: gradients of the memory plans, largest batch, export, overfitting."""
