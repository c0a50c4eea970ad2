"""Releases: content-addressed files, deltas between them, signed manifests."""
