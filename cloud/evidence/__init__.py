"""Evidence: raw demonstrations and drift reports, append-only, and how they come in over MQTT."""
