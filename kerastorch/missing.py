"""Words for a rank that misses another one, which has ended or does something else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# What torch says of it, by gloo and by its watch over collectives.
MISSED = re.compile(r"Timed out waiting|Connection (?:closed|reset) by peer|collective operation timeout")
HAS_ENDED, IN_VAIN = "another rank has ended, which this one missed", "this rank waited in vain for another one"


def is_of_another(error: BaseException) -> bool:
    """Whether torch has raised it because another rank did not take part in something, and nobody has said so yet."""
    text = str(error)
    return isinstance(error, RuntimeError) and bool(MISSED.search(text)) and not text.startswith((HAS_ENDED, IN_VAIN))


def words_of(error: BaseException, where: str) -> str:
    """What has happened, and what to do.

    Args:
        error: As torch has raised it.
        where: In what the other one was missed.
    """
    told = MISSED.search(str(error))[0]
    alike = "Have all ranks do the same: rank 0 alone writes and prints, whoever asks for it."
    if "by peer" in told:
        return (
            f"{HAS_ENDED} {where}. Its own error says why; without one its script was over, as where an if on the rank "
            f"has only some of them save, evaluate or fit. {alike} ({told})"
        )
    return (
        f"{IN_VAIN}, {where}. That one has ended, and its own error says why; or it does something else, as where a "
        f"callback or an if on the rank has only some of them save, evaluate or step. {alike} Or give the backend a "
        f"longer timeout_s. ({told})"
    )


@contextmanager
def missed(where: str) -> Iterator[None]:
    """Says so of whatever is raised meanwhile because another rank did not take part."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_another(error):
            raise
        raise RuntimeError(words_of(error, where)) from error
