"""`python -m services.billing`: see cli.py."""

from services.billing.cli import app

if __name__ == "__main__":
    app(prog_name="python -m services.billing")
