"""The contract between devices and cloud: messages, topics, errors, and the prompt."""
