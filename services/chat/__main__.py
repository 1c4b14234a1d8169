"""`python -m services.chat`: serve until SIGTERM."""

from services.chat.app import build
from services.chat.settings import ChatSettings
from shared import runtime

if __name__ == "__main__":
    runtime.main("chat", ChatSettings, build)
