"""Tests mirror files: tests/cache/store/test_reader.py is about xlsd_cache/store/reader.py."""
