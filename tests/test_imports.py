"""Who may import whom: downwards only, so that each file can be read knowing only those below it.

    __init__ > model > loop > step > tracker > metrics > losses > targets    loop > faults, history, limits, position
                     > compilation > jit > computation > step > accumulation > losses
                                   > optimizers > patterns     > precision > structures
                                   > schedules
                     > microbatch, tbptt, overrides > step
                     > data > tensors, seeding, structures             callbacks.* > callbacks.base
                     > scopes > state                                  loop > faults > memory, step
                     > resume > passes > data, position                data > samples > seeding
                     > backends > structures
                     > checks, summary > tracing     callbacks.checkpoint, state, averages > checkpoint > kinds, writing
                     > preflight > loop, data, losses, ...

Backends know torch and nesting, never models, loops, data or callbacks. Nothing imports `model` but the package itself.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kerastorch

PACKAGE = Path(kerastorch.__file__).parent
BELOW = {
    "__init__": {"averages", "backends", "callbacks", "debugging", "history", "model", "schedules", "seeding"},
    "arguments": {"structures", "tensors"},
    "model": {
        "arguments", "backends", "callbacks.base", "callbacks.debugging", "callbacks.messages", "callbacks.progress",
        "checkpoint", "checks", "compilation", "computation", "data", "export", "folders", "history", "launching",
        "limits", "loop", "losses", "metrics", "microbatch", "optimizers", "overrides", "passes", "patterns",
        "position", "precision", "preflight", "resume", "samples", "scopes", "seeding", "state", "step", "structures",
        "summary", "tbptt", "tensors", "tracker", "tuning", "writing",
    },
    "launching": {"callbacks.base", "samples", "seeding", "state"},
    "compilation": {"computation", "jit", "losses", "optimizers", "patterns", "precision", "schedules", "step"},
    "jit": {"computation", "losses", "memory", "structures"},
    "computation": {"losses", "precision", "step"},
    "microbatch": {"accumulation", "memory", "step", "structures"},
    "tbptt": {"step", "structures"},
    "overrides": {"accumulation", "checks", "optimizers", "precision", "step", "structures"},
    "faults": {"memory", "missing", "step", "structures"},
    "loop": {"faults", "history", "limits", "position", "step", "structures"},
    "position": set(),
    "passes": {"data", "limits", "position", "seeding", "structures"},
    "folders": {"checkpoint", "kinds", "writing"},
    "resume": {"accumulation", "checkpoint", "folders", "passes", "position", "seeding", "state", "step"},
    "samples": {"seeding"},
    "scopes": {"overrides", "precision", "seeding", "state", "step"},
    "limits": {"callbacks.base", "checks", "durations"},
    "step": {"accumulation", "losses", "precision", "structures", "tracker"},
    "accumulation": {"losses"},
    "precision": {"structures"},
    "optimizers": {"patterns"},
    "schedules": {"directions"},
    "tracker": {"history", "losses", "metrics", "structures"},
    "metrics": {"losses", "structures", "targets"},
    "losses": {"targets"},
    "data": {"samples", "seeding", "structures", "tensors"},
    "tensors": {"structures"},
    "checks": {"callbacks.base", "structures"},
    "debugging": set(),
    "durations": set(),
    "__main__": {"environment"},
    "environment": {"__version__", "backends.single"},  # the first a name, not a file
    "recomputing": {"patterns"},
    "export": {"checkpoint", "seeding", "step", "structures"},
    "flops": set(),
    "untouched": {"losses", "seeding"},
    "tuning.__init__": {"tuning.batch_size", "tuning.lr"},
    "tuning.lr": {"callbacks.base", "checks", "data", "tuning.curve", "tuning.rehearsal"},
    "tuning.curve": set(),
    "tuning.batch_size": {
        "callbacks.base", "checks", "data", "memory", "tuning.budget", "tuning.forecast", "tuning.rehearsal",
    },
    "tuning.budget": {"memory"},
    "tuning.forecast": {"losses", "precision", "step", "summary", "tracing"},
    "tuning.rehearsal": {"callbacks.base", "samples", "untouched"},
    "summary": {"tracing"},
    "preflight.__init__": {
        "arguments", "checks", "preflight.data", "preflight.findings", "preflight.hints", "preflight.module",
        "preflight.refusals", "preflight.training", "preflight.trial", "structures",
    },
    "preflight.trial": {
        "callbacks.base", "loop", "losses", "precision", "preflight.layers", "preflight.outputs", "preflight.seen",
        "scopes", "seeding", "step", "structures", "tracker", "untouched",
    },
    "preflight.refusals": {"memory", "preflight.findings", "preflight.layers", "preflight.seen"},
    "preflight.module": {"preflight.findings", "preflight.layers", "preflight.seen"},
    "preflight.data": {
        "losses", "preflight.findings", "preflight.hints", "preflight.outputs", "preflight.seen", "structures",
    },
    "preflight.training": {
        "losses", "preflight.findings", "preflight.module", "preflight.outputs", "preflight.seen", "seeding",
    },
    "preflight.seen": {"arguments", "data", "losses", "preflight.layers", "structures", "tensors"},
    "preflight.layers": {"preflight.hints", "structures"},
    "preflight.outputs": {"losses"},
    "preflight.hints": {"data", "optimizers", "preflight.findings", "step", "structures", "tensors"},
    "backends.__init__": {
        "backends.ddp", "backends.deepspeed", "backends.fsdp", "backends.pipeline", "backends.single", "backends.tpu",
    },
    "backends.ddp": {"backends.batchnorm", "backends.launch", "backends.ranks"},
    "backends.fsdp": {"backends.ddp", "backends.owners", "backends.ranks", "recomputing"},
    "backends.owners": {"backends.ddp"},
    "backends.deepspeed": {"backends.ddp", "backends.zero"},
    "backends.zero": set(),
    "backends.batchnorm": set(),
    "backends.launch": {"backends.ranks"},
    "backends.ranks": {"backends.single", "backends.speed", "missing", "structures"},
    "backends.single": {"recomputing", "structures"},
    "backends.speed": set(),
    "backends.pipeline": {
        "backends.engine", "backends.launch", "backends.ranks", "backends.single", "precision", "structures",
    },
    "backends.engine": {"backends.crossing", "backends.stages", "structures"},
    "backends.crossing": {"backends.stages", "structures"},
    "backends.stages": {"structures"},
    "backends.tpu": {"backends.single", "recomputing", "structures"},
    "state": {"checkpoint", "history"},
    "averages": {"checkpoint"},
    "checkpoint": {"__version__", "kinds", "writing"},  # the first a name, not a file
    "kinds": set(),
    "writing": set(),
    "callbacks.__init__": {f"callbacks.{path.stem}" for path in (PACKAGE / "callbacks").glob("*.py")},
    "callbacks.averaging": {"callbacks.base", "callbacks.rates"},
    "callbacks.backup": {"callbacks.base", "callbacks.files"},
    "callbacks.background": set(),
    "callbacks.files": {"writing"},
    "callbacks.checkpoint": {
        "callbacks.background", "callbacks.base", "callbacks.filenames", "callbacks.files", "callbacks.messages",
        "callbacks.monitoring",
        "checkpoint", "durations", "state", "writing",
    },
    "callbacks.debugging": {"callbacks.base", "debugging", "structures"},
    "callbacks.functions": {"callbacks.base"},
    "callbacks.loggers": {"callbacks.base", "callbacks.files", "writing"},
    "callbacks.measuring": {"callbacks.base", "durations"},
    "callbacks.monitoring": {"callbacks.base", "directions"},
    "callbacks.predictions": {"callbacks.base", "callbacks.files"},
    "callbacks.profiler": {"callbacks.base", "callbacks.files"},
    "callbacks.schedules": {
        "callbacks.base", "callbacks.messages", "callbacks.monitoring", "callbacks.rates", "callbacks.values",
    },
    "callbacks.stopping": {"callbacks.base", "callbacks.messages", "callbacks.monitoring", "callbacks.values"},
    "callbacks.tensorboard": {"callbacks.files", "callbacks.loggers"},
    "callbacks.throughput": {"callbacks.base", "flops", "structures"},
    "callbacks.transfer": {"callbacks.base", "callbacks.rates", "patterns"},
    "callbacks.progress": {"callbacks.base", "directions"},
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
REQUIRED = {"torch", "numpy", "tqdm", "tabulate", "colorama", "torchmetrics", "safetensors", "psutil"}

HEAVY = (REQUIRED - {"torch", "numpy"}) | {
    "matplotlib",
    "pandas",
    "sklearn",
    "IPython",
    "tensorboard",
    "mlflow",
    "wandb",
    "onnx",
    "onnxscript",
    "onnxruntime",
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their dotted names within it."""
    folder = list(path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            found |= {".".join(base)} if node.module else {".".join([*base, alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_import_only_what_is_below_them(path):
    assert imports_of(path) <= BELOW.get(name_of(path), set())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_torch_and_numpy_are_imported_outside_of_functions(path):
    outside = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {alias.name for node in outside if isinstance(node, ast.Import) for alias in node.names}
    roots |= {node.module for node in outside if isinstance(node, ast.ImportFrom) and not node.level}
    third_party = {root.partition(".")[0] for root in roots} - set(sys.stdlib_module_names)
    assert third_party <= {"torch", "numpy"}


def test_importing_brings_in_nothing_heavy_and_leaves_cuda_alone():
    program = (
        "import sys, torch; before = set(sys.modules); import kerastorch\n"
        "assert not torch.cuda.is_initialized()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"assert not new & {HEAVY!r}, new\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
