"""The one exception that means "the user can fix this"."""


class InputError(ValueError):
    """Bad input, missing or broken data, or a bad checkpoint.

    Its message is one sentence that names the value, what is allowed, and the fix.
    `run.py` prints it without a traceback and exits with code 2.
    """
