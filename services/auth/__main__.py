"""`python -m services.auth`: see cli.py."""

from services.auth.cli import app

if __name__ == "__main__":
    app(prog_name="python -m services.auth")
