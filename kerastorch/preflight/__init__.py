"""`Model.check`: what people get wrong before they train for hours, found in one step that leaves no trace.

`trial.py` runs the step, and a check is a function from what was seen (`seen.py`) to its findings, with one job: of
the module (`module.py`), of the data (`data.py`), of the step (`training.py`). It says nothing where it cannot know: a
healthy model gets notes at most. What `fit` refuses or warns of is found by letting it (`refusals.py`), not by rules
of its own. To add a check, write such a function and name it in the `CHECKS` of its file.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..arguments import as_list
from ..checks import refuse_no_split, refuse_nonpositive
from ..structures import named_leaves
from . import data as of_data
from . import module as of_module
from . import refusals
from . import training as of_training
from .findings import Finding as Finding
from .findings import Findings as Findings
from .hints import first_batch_hints as first_batch_hints
from .hints import last_batch_size as last_batch_size
from .trial import Trial

BEFORE_THE_STEP = of_module.CHECKS
AFTER_IT = (*refusals.CHECKS, *of_data.CHECKS, *of_training.CHECKS)


def check(
    model: Any,
    data: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    sample_weight: Any = None,
    callbacks: Any = (),
    validation_data: Any = None,
    validation_split: float = 0.0,
) -> Findings:
    """What `Model.check` returns; see there."""
    began_s = time.perf_counter()
    refuse_nonpositive(batch_size=batch_size)
    refuse_no_split(validation_split)
    trial = Trial(
        model,
        (data, y, sample_weight),
        batch_size=batch_size,
        callbacks=as_list(callbacks),
        validation_data=validation_data,
        split=validation_split,
    )
    with trial.within():
        found = [finding for look in BEFORE_THE_STEP for finding in look(trial)]
        trial.run()
        found += [finding for look in AFTER_IT for finding in look(trial)]
        looked_at = _looked_at(trial)
    return Findings(found, f"{looked_at}, {time.perf_counter() - began_s:.2f} s")


def _looked_at(trial: Trial) -> str:
    parameters = sum(one.numel() for one in trial.module.parameters() if not is_lazy(one))
    said = [f"{parameters:,} parameters"]
    if trial.batch is not None:
        named = [*named_leaves(trial.batch[0], "x"), *named_leaves(trial.batch[1], "y")]
        shapes = [f"{name} {tuple(leaf.shape)}" for name, leaf in named if isinstance(leaf, Tensor)]
        said.append(f"one batch of {', '.join(shapes[:4])}{', ...' * (len(shapes) > 4)}")
    if trial.losses:
        said.append(f"loss at start {float(trial.losses[0]):.4g}")
    if trial.gradients:
        said.append(f"gradient norm {trial.norm:.3g}")
    return ", ".join(said)
