"""The one exception that a user's mistake raises."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: one sentence that names the thing and the remedy. The command line prints it and exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of the traceback."""
        return [f"{type(self).__name__}: {self}"]


class Interrupted(KeyboardInterrupt):
    """A campaign that was interrupted: what is finished, and how it goes on, in a sentence."""

    _render_traceback_ = UserError._render_traceback_


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'usf'?"`` for the known word nearest to ``word``, case aside; "" if none is near."""
    near = get_close_matches(word.lower(), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
