"""What benchmarks share: reports, commands, synthetic stores, training steps, timing."""
