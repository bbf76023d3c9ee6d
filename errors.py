"""The one kind of error that a user can put right."""


class UserError(ValueError):
    """Something asked for cannot be done. The message is one line: what was found, and the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(map(str.strip, str(message).splitlines())))  # numpy prints bounds in several lines
