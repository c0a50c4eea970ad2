"""The update client: fetch a signed release, prove it beside the running student, swap."""
