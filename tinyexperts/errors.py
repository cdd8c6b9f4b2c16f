"""The one exception for what a caller got wrong: the command line prints it as one sentence and exits with code 2."""


class InputError(ValueError):
    """Bad input: the message is one sentence with the value received and the rule."""
