"""make bench-auth: see __main__.py."""
