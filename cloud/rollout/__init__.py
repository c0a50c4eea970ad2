"""Rollouts: waves, health, halt, roll back; a pure state machine and its driver."""
