"""Errors that are the user's to mend: the mains print them as one sentence and exit with 2."""


class UserError(ValueError):
    """Something the user passed or pointed at is wrong. The message says what was got, what was
    expected and what to change."""


def one_line(error: Exception) -> str:
    """Its text without line breaks, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class UnknownName(UserError, KeyError):
    """A name that is not registered. (`KeyError.__str__` would print the message in quotes.)"""

    __str__ = UserError.__str__


class NonFiniteLoss(UserError, FloatingPointError):
    """A loss term became NaN or infinite during training."""
