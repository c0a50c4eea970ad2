"""Learners: turn demonstrations into weights."""
