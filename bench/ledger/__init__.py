"""make bench-ledger: what an operation costs, beside pgbench's TPC-B on the same PostgreSQL in the same run.

A pair is a hold and its settlement: two operations, as in production. Every load is checked by `verify` afterwards.
"""
