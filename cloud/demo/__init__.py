"""The demonstration: simulated homes and people around a real fleet."""
