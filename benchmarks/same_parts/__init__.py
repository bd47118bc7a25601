"""What `benchmarks/same.py` runs, and how it compares what is written."""
