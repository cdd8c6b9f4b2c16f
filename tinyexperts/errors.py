"""The exceptions that the command line prints as one sentence, and the check of a number."""

from typing import ClassVar


class InputError(ValueError):
    """Bad input: the message is one sentence with the value received and the rule; the exit code is 2."""


class EarlyExit(Exception):
    """The end of a process before its work is done; the message is one sentence."""

    exit_code: ClassVar[int] = 1


def require_at_least(least: int, name: str, value: int | None) -> None:
    """Check a number; None passes.

    Args:
        least (int): the smallest number that is allowed.
        name (str): the name of the number in the error.
        value (int | None): the number.

    Raises:
        InputError: the number is smaller.
    """
    if value is not None and value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")
