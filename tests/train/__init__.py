"""Tests of `xlsd_train`, in a folder for each of its rooms."""
