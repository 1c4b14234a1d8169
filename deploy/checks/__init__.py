"""What `make check` proves beyond the linters' own rules."""
