"""Benchmarks of xlsd_cache: build, captions, decoding, reading, scale."""
