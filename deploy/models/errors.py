"""What ends `make model`."""


class ModelError(Exception):
    """One sentence or two for the person who asked: what is wrong, and what to do."""
