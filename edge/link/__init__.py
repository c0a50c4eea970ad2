"""The link to the cloud: a durable outbox, the policy of sending, and the MQTT 5 uplink."""
