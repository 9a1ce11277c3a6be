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
    lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lower, 1)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


def unknown(what: str, word: str, known: Iterable[str], of: str = "", more: str = "") -> UserError:
    """The error of a name that is not known: the nearest known one first, then all of them.

    Args:
        what: of what kind the name is, such as "mode".
        word: the name.
        known: the known ones.
        of: whose it is (default: nobody's).
        more: how the sentence goes on behind them (default: it ends).

    Example:
        >>> unknown("mode", "quik", ["quick", "paper"])
        UserError("unknown mode 'quik'; did you mean 'quick'? known: quick, paper")
    """
    hint = did_you_mean(word, names := list(known))
    beginning = f"unknown {what} {word!r}{f' of {of}' if of else ''}{hint or ';'}"
    return UserError(f"{beginning} known: {', '.join(names) or 'none'}{more}")
