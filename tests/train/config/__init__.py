"""Tests of the room `xlsd_train/config`."""
