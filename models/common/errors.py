"""The one error type that is written for the artist."""
from __future__ import annotations


class LikenessError(ValueError):
    """One sentence that names what was expected, what came, and what to do."""
