"""Drift: three signals, River detectors, one vote."""
