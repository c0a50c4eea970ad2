"""The device's HTTP API on loopback: OpenAI-compatible chat, feedback, health."""
