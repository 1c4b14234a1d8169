"""What a command of the embedded stack can end with."""


class LaunchError(Exception):
    """The command cannot go on; the message is a sentence for the person at the terminal."""


class NotReady(Exception):
    """A health check failed for now; the message says what is missing."""


class ProgramFailed(LaunchError):
    """A program did not become healthy. `program` names it, the message says why and what to do."""

    def __init__(self, program: str, message: str) -> None:
        super().__init__(message)
        self.program = program
