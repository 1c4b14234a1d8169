#!/bin/sh
# Runs once, in an empty cluster: Tollgate's owner, which migrates and makes the services' roles, and Unleash's.
# Passwords reach psql through its environment, never its arguments.
set -eu
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname=postgres <<'SQL'
\getenv owner_password TOLLGATE_OWNER_PASSWORD
\getenv unleash_password UNLEASH_DATABASE_PASSWORD
CREATE ROLE tollgate LOGIN CREATEROLE PASSWORD :'owner_password';
CREATE DATABASE tollgate OWNER tollgate;
CREATE ROLE unleash LOGIN PASSWORD :'unleash_password';
CREATE DATABASE unleash OWNER unleash;
REVOKE CONNECT ON DATABASE unleash FROM PUBLIC;
SQL
