"""The guides for those who come from Lightning or Keras: they answer for every name, and what they say is so.

Every name is one that the installed Lightning or Keras has; every answer is run, or its names and arguments are looked
up; every difference is tried, with both libraries.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt

keras = pytest.importorskip("keras")
pl = pytest.importorskip("lightning.pytorch")

pytestmark = [pytest.mark.conformance, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
GUIDES = {name: (ROOT / "docs" / f"coming-from-{name}.md").read_text() for name in ("lightning", "keras")}


# The guides as rows of tables and blocks of code.


@dataclass(frozen=True)
class Row:
    """What is theirs, by its names, and what the guide answers.

    Attributes:
        section: The heading above it, and the one above that: `("Callbacks", "Their arguments")`.
        theirs: The names; where the first is a function or class, and the others its arguments, the first is `owner`.
    """

    guide: str
    line: int
    section: tuple[str, ...]
    owner: str
    theirs: tuple[str, ...]
    ours: str
    remark: str

    def __str__(self):
        return f"{self.guide}:{self.line} {self.owner} {' '.join(self.theirs)}".replace("  ", " ")


def spans(text):
    return re.findall(r"`([^`]+)`", text)


def rows_of(guide):
    headings, rows = {}, []
    for number, line in enumerate(without_blocks(GUIDES[guide]), 1):
        if found := re.match(r"(##+) (.*)", line):
            headings = {level: name for level, name in headings.items() if level < len(found[1])}
            headings[len(found[1])] = found[2]
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| `") else []
        if cells:
            assert len(cells) == 3, f"{guide}:{number} has {len(cells)} cells"
            # "`fit` `ckpt_path`": an argument of something; "`fit`, `validate`": two names.
            owner = spans(cells[0])[0] if re.match(r"`\w+` `", cells[0]) else ""
            names = tuple(spans(cells[0])[bool(owner) :])
            rows.append(Row(guide, number, tuple(headings.values()), owner, names, *cells[1:]))
    return rows


def without_blocks(text):
    """The lines of a guide; those of code are empty."""
    is_code = False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        yield "" if is_code else line


def blocks_of(guide):
    return re.findall(r"```python\n(.*?)```", GUIDES[guide], flags=re.DOTALL)


ROWS = {guide: rows_of(guide) for guide in GUIDES}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


# Every name is answered for.


def names_in(guide, *sections):
    """The names that have a row of their own in sections, or anywhere."""
    rows = [row for row in ROWS[guide] if not row.owner and (not sections or row.section[0] in sections)]
    return {name for row in rows for name in row.theirs}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def public(kind, *but):
    """Public names of a class that are not those of other classes."""
    known = {name for other in (object, *but) for name in dir(other)}
    return [name for name in dir(kind) if not name.startswith("_") and name not in known and not name.isupper()]


def public_classes(module):
    classes = {name: one for name, one in vars(module).items() if inspect.isclass(one) and not name.startswith("_")}
    library = module.__name__.partition(".")[0]
    return [name for name, one in classes.items() if one.__module__.partition(".")[0] == library]


KERAS_MODEL = itertools.takewhile(lambda kind: kind.__name__ != "Layer", keras.Model.__mro__)
OPTIMIZERS = [
    getattr(keras.optimizers, name) for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "RMSprop", "SGD")
]
NAMES = {
    "Trainer": ("lightning", parameters(pl.Trainer), ["Trainer"]),
    "attributes of Trainer": ("lightning", public(pl.Trainer), ["Trainer"]),
    "LightningModule": ("lightning", public(pl.LightningModule, nn.Module), ["LightningModule", "Hooks"]),
    "hooks of Callback": ("lightning", public(pl.Callback), ["Hooks"]),
    "LightningModule.log": ("lightning", parameters(pl.LightningModule.log), ["self.log"]),
    "LightningDataModule": ("lightning", public(pl.LightningDataModule), ["LightningDataModule"]),
    "seed_everything": ("lightning", parameters(pl.seed_everything), ["Seeds"]),
    "Lightning's callbacks": ("lightning", pl.callbacks.__all__, ["Callbacks"]),
    "Lightning's loggers": ("lightning", pl.loggers.__all__, ["Loggers"]),
    "Lightning's profilers": ("lightning", pl.profilers.__all__, ["Profilers"]),
    "compile": ("keras", parameters(keras.Model.compile), ["compile"]),
    "fit": ("keras", parameters(keras.Model.fit), ["fit"]),
    "keras.Model": (
        "keras",
        sorted({name for kind in KERAS_MODEL for name in vars(kind) if not name.startswith("_")}),
        ["Methods of a model"],
    ),
    "optimizers": ("keras", public_classes(keras.optimizers), ["Optimizers"]),
    "arguments of optimizers": ("keras", [name for one in OPTIMIZERS for name in parameters(one)], ["Optimizers"]),
    "keras.optimizers.schedules": ("keras", public_classes(keras.optimizers.schedules), ["Optimizers"]),
    "Keras's callbacks": ("keras", public_classes(keras.callbacks), ["Callbacks"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_every_name_of_the_peers_has_a_row(kind):
    guide, names, sections = NAMES[kind]
    assert names
    assert not set(names) - names_in(guide, *sections)


OWNERS = {
    "lightning": {name: getattr(pl.callbacks, name) for name in pl.callbacks.__all__}
    | {name: getattr(pl.Trainer, name) for name in ("fit", "validate", "test", "predict", "save_checkpoint")},
    "keras": {name: getattr(keras.callbacks, name) for name in public_classes(keras.callbacks)}
    | {
        name: getattr(keras.Model, name)
        for name in (
            "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch", "summary", "save",
            "save_weights", "load_weights",
        )
    }
    | {"PyDataset": keras.utils.PyDataset},
}  # fmt: skip
NO_NAMES = {("keras", "save"): {"kwargs"}, ("keras", "load_weights"): {"kwargs"}}  # for what is loaded by no name


@pytest.mark.parametrize(("guide", "owner"), [(guide, owner) for guide in OWNERS for owner in OWNERS[guide]])
def test_every_argument_has_a_row_or_is_the_same_here(guide, owner):
    arguments = set(parameters(OWNERS[guide][owner])) - NO_NAMES.get((guide, owner), set())
    rows = [row for row in ROWS[guide] if row.owner == owner]
    answered = {name for row in rows for name in row.theirs} | names_in(guide, "Hooks")  # of LambdaCallback
    main = next((row for row in ROWS[guide] if not row.owner and owner in row.theirs), None)
    if main is not None and main.ours.startswith(("none: ", "not in this version")):
        return
    left = {name for name in arguments - answered if not is_the_same(owner, name, OWNERS[guide][owner])}
    assert not left


def test_every_loss_and_metric_of_keras_is_known_by_its_name_or_has_a_row():
    for library, place in ((keras.losses, "loss"), (keras.metrics, "metrics")):
        names = set(public_classes(library)) - names_in("keras", "Losses and metrics")
        assert len(names) > 10
        for name in names:
            fresh().compile("sgd", **{"loss": "mse", place: name})


def test_optimizers_have_the_defaults_that_the_guide_says():
    rows = [row for row in ROWS["keras"] if row.section == ("Optimizers",) and "there" in row.remark]
    assert len(rows) == 9
    for row in rows:
        theirs, ours = spans(row.remark)
        torchs = next(one for name, one in vars(torch.optim).items() if name.lower() == row.theirs[0].lower())
        for kind, said in ((getattr(keras.optimizers, row.theirs[0]), theirs), (torchs, ours)):
            known = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
            said = eval(f"dict({said})")
            assert {name: known[name] for name in said} == said, row


# Every answer is right.


def our_owner(name):
    """What has the arguments here that `name` has there."""
    return getattr(kt.callbacks, name, None) or getattr(kt.Model, name, None)


def is_the_same(owner, argument, theirs):
    """Whether ours has an argument of the same name and default."""
    ours = our_owner(owner)
    if ours is None or argument not in inspect.signature(ours).parameters:
        return False
    defaults = [inspect.signature(one).parameters[argument].default for one in (theirs, ours)]
    return defaults[0] == defaults[1] or defaults in ([None, ()], [inspect.Parameter.empty] * 2)


def fresh():
    torch.manual_seed(0)
    return kt.Model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 10)), backend="cpu")


X, Y = torch.rand(40, 4), torch.arange(40) % 10
LOADER = DataLoader(TensorDataset(X, Y), batch_size=8)


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8].numpy(), Y[8 * index : 8 * index + 8].numpy()


def compiled():
    return fresh().compile("sgd", "cross_entropy")


def run_fit(*data, **options):
    held_out = {} if {"validation_split", "validation_data"} & set(options) else {"validation_data": LOADER}
    return compiled().fit(*(data or (X, Y)), **{"epochs": 1, "verbose": 0} | held_out | options)


class Either:
    """`self` is a model or a callback."""

    def __init__(self, model, callback):
        self._model, self._callback = model, callback

    def __getattr__(self, name):
        return getattr(self._model if hasattr(self._model, name) else self._callback, name)


def world():
    """What the guides' tables speak of: verbs, callbacks, hooks, and names of the user's that are easy to guess."""
    model, callback = compiled(), kt.Callback()
    model.fit(X, Y, verbose=0)
    callback.set_model(model)
    callback.set_params(model.history.params)
    verbs = {
        "compile": lambda *given, **options: fresh().compile(*given, **options),
        "fit": run_fit,
        "evaluate": lambda *data, **options: compiled().evaluate(*data, **{"verbose": 0} | options),
        "predict": lambda *data, **options: compiled().predict(*data, **{"verbose": 0} | options),
    }
    overridden = {name: getattr(model, name) for name in ("compute_loss", "train_step")}
    hooks = {name: getattr(callback, name) for name in dir(kt.Callback) if name.startswith("on_")}
    users = {
        "x": X, "y": Y, "train": LOADER, "val": LOADER, "test": LOADER, "net": model.module,
        "dataset": LOADER.dataset, "other": LOADER.dataset, "make_loader": lambda: LOADER, "sequence": Sequence(),
        "data": SimpleNamespace(**{f"{kind}_dataloader": lambda: LOADER for kind in ("train", "val", "test")}),
        "make_optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1),
        "my_loss": lambda output, target: output.sum(1), "my_metric": lambda output, target: output.sum(1),
        "MeanSquaredError": torchmetrics.MeanSquaredError,
    }  # fmt: skip
    libraries = {"kt": kt, "torch": torch, "nn": nn, "torchmetrics": torchmetrics, "partial": functools.partial}
    callbacks = {name: getattr(kt.callbacks, name) for name in public_classes(kt.callbacks) if name != "Callback"}
    backends = {name: getattr(kt.backends, name) for name in public_classes(kt.backends)}
    own = {"model": model, "callback": callback, "self": Either(model, callback), "DataLoader": DataLoader}
    return vars(builtins) | libraries | own | verbs | overridden | hooks | callbacks | backends | users


WORLD = world()
VERBS = {name: getattr(WORLD["model"], name) for name in ("compile", "fit", "evaluate", "predict")}
NOT_RUN = {"training_batches", "jit"}  # the one needs a run around it, the other a minute
FREE = {"forward", "cProfile", "NO_COLOR"}  # names in answers that are nothing of ours


def meant(node):
    """The object that an expression of names and dots means; `None` = nobody knows, as of the user's own names."""
    if isinstance(node, ast.Name):
        return VERBS.get(node.id, WORLD.get(node.id))
    if isinstance(node, ast.Call):
        return WORLD["model"] if meant(node.func) is kt.Model else None
    if not isinstance(node, ast.Attribute):
        return None
    whole = meant(node.value)
    if whole is None:
        return None
    assert hasattr(whole, node.attr), f"there is no {ast.unparse(node)}"
    return getattr(whole, node.attr)


def look_up(code, is_all_ours):
    """Names must be there, and calls have arguments that what they call takes."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            meant(node)
        if isinstance(node, ast.Call):
            function = meant(node.func)
            if function is None:
                assert not is_all_ours or not isinstance(node.func, ast.Name), f"there is no {ast.unparse(node.func)}"
                continue
            bind(function, node)


def bind(function, call):
    positional = list(call.args)
    if function is functools.partial:
        function = meant(positional.pop(0))
    try:
        signature = inspect.signature(function)
    except ValueError:  # of what is written in C
        return
    takes_part = function in VERBS.values() or inspect.ismethod(function) or call.func != function
    binds = signature.bind_partial if takes_part else signature.bind
    binds(*positional, **{keyword.arg: keyword.value for keyword in call.keywords})


def is_runnable(code):
    """Whether code calls something of ours, with what is there."""
    tree = ast.parse(code)
    if not isinstance(tree.body[0], ast.Expr) or not isinstance(tree.body[0].value, ast.Call):
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names -= {argument.arg for node in ast.walk(tree) if isinstance(node, ast.Lambda) for argument in node.args.args}
    root = re.match(r"\w+", code)[0]
    is_ours = root in {"model", "str", *VERBS, *public_classes(kt.callbacks), *public_classes(kt.backends)}
    return is_ours and names <= set(WORLD) and not NOT_RUN & set(re.findall(r"\w+", code))


ANSWERS = [(row, code) for row in ALL_ROWS for code in spans(row.ours)]


@pytest.mark.parametrize(("row", "code"), ANSWERS, ids=[f"{row}: {code}" for row, code in ANSWERS])
def test_an_answer_is_code_that_runs(row, code, files):
    look_up(code, is_all_ours=True)
    node = ast.parse(code).body[0]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Name):
        assert node.value.id in set(WORLD) | FREE | names_in(row.guide), code
    if is_runnable(code):
        try:
            eval(code, world())
        except ImportError as error:
            pytest.skip(str(error))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to be in, with the files that the guides load."""
    monkeypatch.chdir(tmp_path)
    model = compiled()
    model.fit(X, Y, verbose=0)
    model.save("run.pt")
    for name in ("weights", "best", "digits"):
        model.save_weights(f"{name}.safetensors")


@pytest.mark.parametrize("guide", GUIDES)
def test_code_in_remarks_and_prose_names_what_is_there(guide):
    looked_up = 0
    for line in without_blocks(GUIDES[guide]):
        for code in spans(line):
            try:
                ast.parse(code)
            except SyntaxError:
                continue
            look_up(code, is_all_ours=False)
            looked_up += 1
    assert looked_up > 100


@pytest.mark.parametrize("row", ALL_ROWS, ids=str)
def test_a_row_has_an_answer(row):
    assert row.theirs
    if row.ours == "the same":
        owner = row.owner or row.section[0]
        theirs = OWNERS[row.guide].get(owner) or getattr(keras.Model, owner)
        assert all(is_the_same(owner, name, theirs) for name in row.theirs)
    else:
        assert re.match(r"none: \S|not in this version$|`", row.ours)


LATER = {
    "BatchSizeFinder": lambda: hasattr(kt.Model, "find_batch_size"),
    "LearningRateFinder": lambda: hasattr(kt.Model, "find_lr"),
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_not_in_this_version_is_really_not_there(name):
    rows = [row for row in ALL_ROWS if name in row.theirs]
    assert rows and all(row.ours == "not in this version" for row in rows) is not LATER[name]()


@pytest.mark.parametrize(
    "section", [("Trainer",), ("Callbacks",), ("Optimizers",), ("Loggers",), ("Profilers",)], ids=lambda one: one[0]
)
def test_tables_are_sorted(section):
    for guide in GUIDES:
        names = [row.theirs[0].lower() for row in ROWS[guide] if row.section == section]
        assert names == sorted(names)


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    text = "\n".join(without_blocks(GUIDES[guide]))
    slugs = {re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in re.findall(r"^#+ (.*)$", text, re.M)}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10
    assert all(link[1:] in slugs if link.startswith("#") else (ROOT / "docs" / link).exists() for link in links)
    assert f"(docs/coming-from-{guide}.md)" in (ROOT / "README.md").read_text()


# The examples.


def lines_of(code):
    return len([line for line in code.splitlines() if line])


def test_lightning_and_kerastorch_end_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup, theirs, ours, steps = blocks_of("lightning")
    nets = []
    for code in (theirs, ours):
        torch.manual_seed(0)
        space = {}
        exec(setup, space)
        exec(code, space)
        nets.append(space["net"])
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other.cpu())
    assert space["history"].history["val_accuracy"][-1] > 0.85
    exec(steps, space)
    assert all(lines_of(code) <= 20 for code in (theirs, ours))


def test_keras_and_kerastorch_learn_as_much(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup, theirs, ours, step = blocks_of("keras")
    accuracies = []
    for code in (theirs, ours):
        keras.utils.set_random_seed(0)
        space = {}
        exec(setup, space)
        exec(code, space)
        accuracies.append(space["accuracy"])
    assert min(accuracies) > 0.9 and abs(accuracies[0] - accuracies[1]) < 0.05
    exec(step, space)
    assert all(lines_of(code) <= 20 for code in (theirs, ours))
