"""The two kinds of failure a user sees, each with its exit code."""

from __future__ import annotations


class CrossbitError(Exception):
    """A failure with a one-line message for the user: what, where, what to do."""

    exit_code: int = 1


class InputError(CrossbitError):
    """Bad usage or bad input, found before any work started (exit code 2)."""

    exit_code = 2


class WorkError(CrossbitError):
    """A failure after work had started (exit code 1)."""

    exit_code = 1
