"""All SQL of auth, one file a noun. Each repository works in the transaction of the session it is given."""
