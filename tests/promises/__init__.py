"""Tests of what crosses rooms: promises that several modules keep together."""
