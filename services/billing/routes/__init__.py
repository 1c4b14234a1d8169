"""HTTP to domain and back, one file a noun."""
