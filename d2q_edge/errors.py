"""The one exception of this package that a user is meant to read, and how it and other strangers' text are shown."""

LONGEST = 1000
"""Characters of a message that are shown."""


class D2QError(Exception):
    """The request can't be carried out.

    The message is one clear sentence that says what is wrong and what to do about it. The command line prints it
    on stderr and exits with code 1; library callers catch it. Anything else that escapes is a bug.
    """


def sentence(error: BaseException) -> str:
    """An error's message for a terminal: one line of bearable length, and no characters that could steer the terminal.

    Messages quote those of other libraries, which may have many lines, and values from strangers' files.
    """
    line = " ".join(str(error).split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 300]} [...] {line[-293:]}"
    return printable(line)


def printable(line: str) -> str:
    """A line of strangers' text without what could steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
