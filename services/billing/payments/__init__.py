"""How credits are paid for: a port, and what is behind it."""
