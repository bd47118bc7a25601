"""Tests of the room `xlsd_cache/dataset`."""
