"""Benchmarks of xlsd_train: equality of the plans, largest batch, export, overtraining."""
