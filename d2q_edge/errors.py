"""The one exception of this package that a user is meant to read."""


class D2QError(Exception):
    """The request can't be carried out.

    The message is one clear sentence that says what is wrong and what to do about it. The command line prints it
    on stderr and exits with code 1; library callers catch it. Anything else that escapes is a bug.
    """
