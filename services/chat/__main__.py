"""`python -m services.chat`: see cli.py."""

from services.chat.cli import app

if __name__ == "__main__":
    app(prog_name="python -m services.chat")
