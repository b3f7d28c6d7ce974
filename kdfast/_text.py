"""Text from outside, such as the names of files, as a terminal may show it."""

__all__ = ["printable"]


def printable(text):
    """`text` with escapes for control characters and for bytes of a file's name that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
