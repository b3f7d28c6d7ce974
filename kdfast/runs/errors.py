"""The error that ends a command with one line."""

__all__ = ["RunError"]


class RunError(Exception):
    """A problem the user can solve; the message is one line that says what came and what is expected."""
