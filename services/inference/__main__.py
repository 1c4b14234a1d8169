"""python -m services.inference: serve until SIGTERM."""

from services.inference.app import NAME, build
from services.inference.settings import Settings
from shared import runtime

if __name__ == "__main__":
    runtime.main(NAME, Settings, build)
