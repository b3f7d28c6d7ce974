"""`kdfast distill`: train a teacher, a student alone and students with each chosen loss, and compare them.

The parts, in the order a run meets them: ``cli`` (arguments), ``settings`` (checks, the stored run), ``data``,
``models``, ``losses`` (one row per loss), ``ensembles`` (students that learn together), ``train``, ``timing``,
``storage`` (atomic files), ``report``; ``pipeline`` puts them together.
"""

__all__ = ["DistillError"]


class DistillError(Exception):
    """A problem the user can solve; the message is one line that says what came and what is expected."""
