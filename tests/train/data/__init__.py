"""Tests of the room `xlsd_train/data`."""
