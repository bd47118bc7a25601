"""Tests of the room `xlsd_train/progress`."""
