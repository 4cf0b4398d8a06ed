"""A user's mistake, told in one line."""

USER_ERROR = 2  # exit code


class UserError(ValueError):
    """What a user can mend: a flag, a file, a model that does not fit. Recipes print its text without a traceback."""


def one_line(error: BaseException) -> str:
    """The text of an error in one line; blanks inside a line stay, they may belong to a path."""
    return " ".join(filter(None, (line.strip() for line in str(error).splitlines()))) or type(error).__name__
