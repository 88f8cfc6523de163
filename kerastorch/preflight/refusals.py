"""What `fit` itself would refuse or warn of, as findings: the rules are those of the files that have them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..memory import is_out_of_memory
from .findings import Finding
from .layers import ROOT
from .seen import Failure, Seen

# What an error says -> the name of its finding; the first that fits.
NAMES = (
    (" monitors ", "monitor"),
    ("no trainable parameters", "nothing-to-train"),
    ("has no gradient", "no-gradient"),
    ("computes in torch.", "dtype"),
    ("no targets", "no-targets"),
    ("class indices from", "target-range"),
    ("no class indices", "target-range"),
    ("neither class indices", "target-range"),
    ("have indices from", "index-range"),
    ("probabilities from 0 to 1", "probabilities"),
    ("more than 1 value per channel", "batch-of-one"),
    ("shape", "shapes"),
    ("size", "shapes"),
)
REMEDIES = {
    "batch-of-one": "Give batches of at least 2 samples: one value has no variance to normalize by.",
    "shapes": "Give the layer the sizes of its inputs, or reshape these before it.",
    "memory": 'Give a smaller batch_size, or fit(microbatch="auto").',
}
PLACES = {
    "callbacks": "callbacks",
    "data": "data",
    "optimizer": ROOT,
    "step": "loss",
    "metrics": "metrics",
    "evaluation": "eval mode",
    "validation_data": "validation_data",
}
LONGEST = 300  # characters of a foreign error


def errors(seen: Seen) -> Iterator[Finding]:
    yield from map(_from_failure, seen.failures)


def _from_failure(failure: Failure) -> Finding:
    text = " ".join(str(failure.error).split()) or "it has no message"
    name = next((name for part, name in NAMES if part in text), failure.stage.replace("_", "-"))
    if is_out_of_memory(failure.error):
        name = "memory"
    found, remedy = _sentences(text)
    if not isinstance(failure.error, (ValueError, TypeError)):
        found, remedy = f"{type(failure.error).__name__}: {text[:LONGEST]}", ""
    if failure.got:
        found = f"{found.rstrip('.')}; the layer was given {failure.got}."
    remedy = remedy or REMEDIES.get(name, "Call fit for the whole traceback: it ends with the same error.")
    return Finding("error", name, _place(failure), found, remedy)


def _place(failure: Failure) -> str:
    place = PLACES[failure.stage]
    if not failure.where:
        return place
    return failure.where if failure.stage == "step" else f"{place}, {failure.where}"


def warnings(seen: Seen) -> Iterator[Finding]:
    for text in dict.fromkeys(seen.warnings):
        found, remedy = _sentences(" ".join(text.split()))
        if " NaN" in text and "Fill or drop" in text:
            severity = "warning" if seen.is_loss_finite else "error"
            yield Finding(severity, "data-not-finite", text.partition(" has ")[0], found, remedy)
        elif "expects logits" in text:
            yield Finding("warning", "probabilities", "outputs", found, remedy)
        elif "Using a target size" in text:  # torch's, of a loss that a module computes itself
            yield Finding("warning", "broadcast", "loss", found, "Give targets of the shape that the outputs have.")
        else:
            yield Finding("note", "warning", "the step", found[:LONGEST], remedy or "fit gives the same warning.")


CHECKS = (errors, warnings)


def _sentences(text: str) -> tuple[str, str]:
    """What was found, the first sentence, and the rest, which says what to do."""
    first = re.split(r"(?<!e\.g)\.\s+(?=[A-Z\"'`])", text, maxsplit=1)
    found, remedy = (*first, "")[:2]
    # Words, but no names such as `x` and `batch_size=2`.
    found = found[:1].upper() + found[1:] if re.match(r"[a-z]{2,}\b(?![=_])", found) else found
    return found.rstrip(".") + ".", remedy
