"""What runs on a device. May import protos, never cloud; needs no torch."""
