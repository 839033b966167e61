"""What ends a command with one line instead of a traceback."""


class InputError(ValueError):
    """A value, file or folder the user gave cannot be used.

    The message names the key or file, the row where there is one, the value found, and what would be right.
    The command line prints it as one line without a traceback.
    """


class RunError(RuntimeError):
    """A run cannot go on: the disk is full, or the loss is no number.

    The message says where it stood and what is left of it. The command line prints it as one line without a traceback.
    """
