"""A small SD1.5 and real photos: what `make demo` runs on, and the tests."""
