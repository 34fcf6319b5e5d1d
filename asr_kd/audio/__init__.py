"""Sound → network input."""
