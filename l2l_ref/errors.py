"""The one exception that means "the user can fix this", and how long a message may be."""


class InputError(ValueError):
    """Bad input, missing or broken data, or a bad checkpoint.

    Its message is one sentence that names the value, what is allowed, and the fix.
    `run.py` prints it without a traceback and exits with code 2.
    """


def shortened(words: object, most: int = 600) -> str:
    """Without the middle, where a value is very long."""
    text = str(words)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
