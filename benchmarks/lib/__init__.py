"""What several benchmarks share: machine line, synthetic stores, real steps, turns."""
