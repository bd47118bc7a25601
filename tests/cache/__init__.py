"""Tests of `xlsd_cache`, in a folder for each of its rooms."""
