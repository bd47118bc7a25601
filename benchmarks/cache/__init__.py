"""Benchmarks of xlsd_cache: build, captions, decoding, random reads, killed nodes of Ray."""
