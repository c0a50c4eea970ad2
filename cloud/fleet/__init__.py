"""The gRPC service that devices fetch releases from and report to."""
