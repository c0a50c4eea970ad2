"""Working memory: demonstrations in use until a release covers them."""
