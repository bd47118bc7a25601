"""A small SD1.5 and real photos for `make demo`, `make article` and the tests."""
