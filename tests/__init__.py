"""Tests mirror the rooms of the two packages.

`tests/cache/store/test_reader.py` tests `xlsd_cache/store/reader.py`, and so on. `tests/support`
has the helpers that several test modules share, `tests/promises` what crosses rooms: whole
commands, kills, docs, the wheel. Fixtures of all tests are in `tests/conftest.py`.
"""
