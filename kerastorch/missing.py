"""Words for a rank that misses another one, which has ended or does something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# What torch says of it, by gloo and by its watch over collectives.
MISSED = re.compile(r"Timed out waiting|Connection (?:closed|reset) by peer|collective operation timeout")
ALIKE = "Have all ranks do the same: rank 0 alone writes and prints, whoever asks for it."
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
    if "by peer" in told:
        return (
            f"{HAS_ENDED} {where}. Its own error says why; without one its script was over, as where an if on the rank "
            f"has only some of them save, evaluate or fit. {ALIKE} ({told})"
        )
    return (
        f"{IN_VAIN}, {where}. That one has ended, and its own error says why; or it does something else, as where a "
        f"callback or an if on the rank has only some of them save, evaluate or step. {ALIKE} Or give the backend a "
        f"longer timeout_s. ({told})"
    )


def refuse_other_askers(asked: Sequence[str]) -> None:
    """All ranks must ask for the same.

    Args:
        asked: What each of them was called for, by rank; empty = for something within a run.
    Raises:
        RuntimeError: they do different things.
    """
    other = next((rank for rank, one in enumerate(asked) if one != asked[0]), None)
    if other is not None:
        raise RuntimeError(
            f"ranks do different things: rank 0 is in {asked[0] or 'a run'}, rank {other} in "
            f"{asked[other] or 'a run'}, as where an if on the rank has only some save, evaluate or fit. {ALIKE}"
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
