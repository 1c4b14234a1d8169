"""Entry of the embedded stack. Any Python 3 can read this file, so that too old a one is told so in a sentence."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 this is the check
    sys.stderr.write(
        "Tollgate needs Python 3.11 or newer; "
        + sys.executable
        + " is "
        + ".".join(str(part) for part in sys.version_info[:3])
        + ". Install one and name it: make up PYTHON=python3.12\n"
    )
    sys.exit(1)

from deploy.local.bootstrap import main

main(sys.argv[1:])
