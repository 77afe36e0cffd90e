"""The one exception for what a user can cause."""


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one line: what is wrong, where it stands (file, record, field), how to mend it. The
    command line prints it as it is and exits with status 2.
    """
