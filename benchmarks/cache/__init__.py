"""Benchmarks of xlsd_cache: build, captions, decoding, random reads, scale."""
