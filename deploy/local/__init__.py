"""The embedded stack: every component of Tollgate on one machine, out of wheels and npm.

`python3 -m deploy.local up` is what `make up` runs. The modules, in reading order: `bootstrap` (environments,
standard library only), `preflight` (what the machine must have), `state` (paths, secrets, ports), `programs`
(one specification per process) with `postgres`, `valkey`, `unleash`, `triton` and `services` behind it,
`supervisor` (supervisord and its RPC), `stack` (up, down, status), `cli`.
"""
