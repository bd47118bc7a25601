"""Tests of the room `xlsd_cache/archives`."""
