"""Tests mirror files: tests/cache/test_store.py is about xlsd_cache/store.py."""
