"""The error for everything that users can do wrong, and how a command ends with it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user; str(error) is the one line to print."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def exit_status(run: Callable[[], object]) -> int:
    """Run a command: 0, or with a line on stderr 2 after a UserError and 130 after Ctrl-C."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
