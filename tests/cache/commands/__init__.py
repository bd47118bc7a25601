"""Tests of the room `xlsd_cache/commands`."""
