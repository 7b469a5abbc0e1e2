"""The error for everything that users can do wrong."""


class UserError(Exception):
    """A mistake of the user; str(error) is the one line to print."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
