"""Define the exception that users are meant to read, and make untrusted text safe to print on a terminal."""

MAX_LENGTH = 1000
"""Characters of a message that are shown."""


class D2QError(Exception):
    """The request can't be carried out; the message is one sentence that says what is wrong and what to do about it.

    The command line prints it on stderr and exits with code 1. Any other exception that escapes is a bug.
    """


def sentence(error: BaseException) -> str:
    """Return an error's message as one printable line of at most MAX_LENGTH characters.

    Messages quote other libraries' messages, which may have many lines, and values from untrusted files.
    """
    line = " ".join(str(error).split())
    if len(line) > MAX_LENGTH:
        line = f"{line[: MAX_LENGTH - 300]} [...] {line[-293:]}"
    return printable(line)


def printable(line: str) -> str:
    """Escape everything in untrusted text that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
