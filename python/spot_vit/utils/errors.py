"""Faults that are the user's to mend, apart from those of the program; imports nothing."""

from __future__ import annotations


class UserError(ValueError):
    """A fault of the user's input or surroundings that one clear line explains.

    Its text says what was expected, what came, and the cure. Commands print it and end with
    status 2, without a traceback.
    """
