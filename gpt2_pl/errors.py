"""The one exception for input the user can correct."""


class InputError(ValueError):
    """A value, file or folder the user gave cannot be used.

    The message names the key or file, the row where there is one, the value found, and what would be right.
    The command line prints it as one line without a traceback.
    """
