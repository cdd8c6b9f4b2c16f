"""The exceptions that the command line prints as one sentence."""

from typing import ClassVar


class InputError(ValueError):
    """Bad input: the message is one sentence with the value received and the rule; the exit code is 2."""


class EarlyExit(Exception):
    """The end of a process before its work is done; the message is one sentence."""

    exit_code: ClassVar[int] = 1
