"""The one exception that means "the user can fix this", and how long a message may be."""


class InputError(ValueError):
    """Bad input, missing or broken data, or a bad checkpoint.

    Its message is one sentence that names the value, what is allowed, and the fix.
    `run.py` prints it without a traceback and exits with code 2.
    """


def shortened(words: object, most: int = 600) -> str:
    """In one line, without the middle where it is very long; of an empty error its class."""
    text = " ".join(str(words).splitlines()) or type(words).__name__
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def must(right: bool, name: str, value: object, allowed: str) -> None:
    """InputError unless it is `right`: what is called so is that value, and what is allowed."""
    if not right:
        raise InputError(f"{name} is {value!r}: it must be {allowed}")
