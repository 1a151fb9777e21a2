"""The one exception that commands turn into one line and exit code 2."""


class UserError(Exception):
    """What the user gave, or the machine, cannot do this; the message is the whole explanation."""
