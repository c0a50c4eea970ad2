"""Drift: three signals, sequential tests, one vote."""
