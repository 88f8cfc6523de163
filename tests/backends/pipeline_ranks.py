"""What the ranks of `test_pipeline.py` run: each case beside the same training in one process, by hand.

`python pipeline_ranks.py FOLDER` starts 2 and then 4 processes: their first writes `{case: {what: largest difference or
value}}` into `2.json` and `4.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from kerastorch.backends.engine import Count, Engine

SAMPLES, IGNORED = 53, -100
CASES: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {}


def case(ranks: int) -> Callable:
    """Runs it where so many processes are."""

    def register(function: Callable) -> Callable:
        CASES[function.__name__] = ranks, function
        return function

    return register


# Modules and data.


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), tail,
    )  # fmt: skip


def points() -> tuple[Tensor, Tensor]:
    """53 samples, which nothing divides; a fifth of the targets is masked, unevenly."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 8, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)
    y[:7], y[20::9] = IGNORED, IGNORED
    return x, y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        return x + self.feed(x)


class Transformer(nn.Module):
    """Two inputs, a parameter of its own, integers and a bool that later stages need, two outputs."""

    def __init__(self, words: int = 11, width: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(12, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head, self.tag = nn.Linear(width, words), nn.Linear(width, 2)

    def forward(self, ids: Tensor, lengths: Tensor, scale: float | None = None) -> dict[str, Tensor]:
        padding = torch.arange(ids.shape[1], device=ids.device)[None] >= lengths[:, None]
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, padding)
        if scale is not None:
            x = x * scale
        tokens = self.head(x) + 0 * ids.unsqueeze(-1)
        return {"tokens": tokens.reshape(len(lengths), ids.size(1), -1), "tag": self.tag(x).mean(1)}


def sentences() -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 11, (SAMPLES, 9), generator=generator)
    lengths = torch.randint(1, 10, (SAMPLES,), generator=generator)
    tokens = torch.where(torch.arange(9)[None] < lengths[:, None], ids.roll(-1, 1), IGNORED)
    return (ids, lengths), {"tokens": tokens, "tag": torch.randint(0, 2, (SAMPLES,), generator=generator)}


class TwoLosses:
    """A mean over tokens that are not masked, and half of one over samples."""

    def counts(self, output: Any, target: Any, samples: int) -> dict[str, Any]:
        assert output["tokens"].is_meta
        return {"tokens": (target["tokens"] != IGNORED).sum(), "samples": samples}

    def shares(self, output: Any, target: Any, weight: Any, samples: int) -> list[Count]:
        counts = self.counts({"tokens": output["tokens"].detach().to("meta")}, target, samples)
        return [
            Count("tokens", F.cross_entropy(output["tokens"].transpose(1, 2), target["tokens"]), counts["tokens"]),
            Count("samples", 0.5 * F.cross_entropy(output["tag"], target["tag"]), samples),
        ]


def convnet(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(12)] if norm else [nn.Identity(), nn.Identity()]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), norms[0], nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    x = torch.tensor(data.images[:301], dtype=torch.float32).unsqueeze(1) / 16
    return x, torch.tensor(data.target[:301])


# Training, by hand and in stages.


def cut(tree: Any, rows: slice) -> Any:
    if isinstance(tree, dict):
        return {name: cut(part, rows) for name, part in tree.items()}
    return tuple(cut(part, rows) for part in tree) if isinstance(tree, tuple) else tree[rows]


def batches(x: Any, y: Any, samples: int, size: int = 16) -> Iterator[tuple[Any, Any]]:
    for first in range(0, samples, size):
        yield cut(x, slice(first, first + size)), cut(y, slice(first, first + size))


def call(module: nn.Module, x: Any) -> Any:
    return module(*x) if isinstance(x, tuple) else module(x)


def masked(output: Tensor, target: Tensor, weight: Any = None) -> Tensor:
    return F.cross_entropy(output, target)


class MeanLoss:
    """One mean, over samples or over what `counted` says of their targets."""

    def __init__(self, function: Callable[..., Tensor], counted: Callable[[Any], Any] | None = None) -> None:
        self.function, self.counted = function, counted

    def counts(self, output: Any, target: Any, samples: int) -> dict[str, Any]:
        return {"": samples if self.counted is None else self.counted(target)}

    def shares(self, output: Any, target: Any, weight: Any, samples: int) -> list[Count]:
        return [Count("", self.function(output, target, weight), self.counts(output, target, samples)[""])]


MASKED = MeanLoss(masked, lambda target: (target != IGNORED).sum())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 3e-3, eps=1e-4)


def by_hand(module: nn.Module, optimizer: Any, data: list, loss: Callable, epochs: int = 2, clip: float = 0.5) -> list:
    seen = []
    for _ in range(epochs):
        for x, y in data:
            value = loss(call(module, x), y)
            optimizer.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            seen.append((value.item(), norm.item()))
    return seen


def in_stages(
    pipeline: Engine,
    module: nn.Module,
    optimizer: Any,
    data: list,
    criterion: Any,
    epochs: int = 2,
    clip: float = 0.5,
) -> list:
    seen = []
    for _ in range(epochs):
        for x, y in data:
            value = pipeline.train((x, y, None), criterion)
            norm = pipeline.clip_gradients(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            seen.append((pipeline.from_last(value).item(), norm.item()))
    return seen


def compared(
    make: Callable,
    rule: Callable,
    x: Any,
    y: Any,
    loss: Callable,
    criterion: Any,
    samples: int = SAMPLES,
    **options: Any,
) -> dict[str, Any]:
    """Two epochs in both ways; outputs of all samples, by the last rank, the first and all."""
    data = [*batches(x, y, samples)]
    one, many = make(), make()
    with torch.no_grad():
        for parameter in many.parameters() if dist.get_rank() else ():
            parameter.add_(1.0)  # the weights of rank 0 count
    given, shapes = [*many.parameters()], [parameter.shape for parameter in many.parameters()]
    rules = rule(one.parameters()), rule(many.parameters())
    seen = by_hand(one, rules[0], data, loss)
    pipeline = Engine(**options)
    pipeline.start(many, cut(x, slice(0, 2)))
    pipeline.adopt(rules[1])
    assert [parameter.shape for parameter in many.parameters()] == shapes
    here = sum(tensor.numel() for tensor in many.parameters() if not tensor.is_meta)
    trained = in_stages(pipeline, many, rules[1], data, criterion)
    many.eval(), one.eval()
    expected = call(one, x)
    output = pipeline.forward(x, to="all")
    assert (pipeline.forward(x) is not None) == pipeline.is_last
    pipeline.finish()
    assert all(before is after for before, after in zip(given, many.parameters(), strict=True))
    return {
        "seen": distance(seen, trained),
        "weights": distance(one.state_dict(), many.state_dict()),
        "optimizer": distance(rules[0].state_dict(), rules[1].state_dict()),
        "output": distance(expected, output),
        "part": here / sum(parameter.numel() for parameter in given),
    }


def distance(one: Any, other: Any) -> float:
    """The largest difference of numbers in two trees; infinite where they differ in something else."""
    if isinstance(one, Tensor):
        is_alike = isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype
        is_alike = is_alike and one.device == other.device
        return float((one.detach().double() - other.detach().double()).abs().max()) if is_alike else float("inf")
    if isinstance(one, dict):
        if [*one] != [*other]:
            return float("inf")
        return max([distance(one[name], other[name]) for name in one], default=0.0)
    if isinstance(one, (list, tuple)):
        return max([distance(a, b) for a, b in zip(one, other, strict=True)], default=0.0)
    if isinstance(one, float):
        return abs(one - other)
    return 0.0 if one == other else float("inf")


# Two ranks.


def mlp_case(rule: Callable = sgd, **options: Any) -> dict[str, Any]:
    return compared(mlp, rule, *points(), masked, MASKED, **options)


@case(2)
def gpipe() -> dict[str, Any]:
    return mlp_case(schedule="gpipe", microbatches=4)


@case(2)
def one_forward_one_backward() -> dict[str, Any]:
    return mlp_case(adamw, schedule="1f1b", microbatches=3)


@case(2)
def interleaved() -> dict[str, Any]:
    return mlp_case(adamw, schedule="interleaved1f1b", microbatches=5)


@case(2)
def looped() -> dict[str, Any]:
    return mlp_case(schedule="loopedbfs", stages=6, microbatches=4)


@case(2)
def more_microbatches_than_samples() -> dict[str, Any]:
    return mlp_case(microbatches=64)


@case(2)
def one_microbatch() -> dict[str, Any]:
    return mlp_case(adamw, microbatches=1)


def in_place() -> nn.Sequential:
    """Layers that change what they get: the batch itself and what arrives from the stage before."""
    torch.manual_seed(6)
    shift = nn.ReLU6(inplace=True)
    return nn.Sequential(shift, nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3), nn.ReLU(inplace=True))


@case(2)
def changed_in_place() -> dict[str, Any]:
    x, y = points()
    options = {"schedule": "interleaved1f1b", "balance": ["1", "2", "4"], "microbatches": 2}
    return compared(in_place, sgd, x.relu() / 9, y, masked, MASKED, **options)


@case(2)
def by_time() -> dict[str, Any]:
    return mlp_case(balance="time")


@case(2)
def recomputed() -> dict[str, Any]:
    return mlp_case(adamw, checkpoint_activations=True, microbatches=4)


def two_losses(output: Any, target: Any) -> Tensor:
    tokens = F.cross_entropy(output["tokens"].transpose(1, 2), target["tokens"])
    return tokens + 0.5 * F.cross_entropy(output["tag"], target["tag"])


def transformer() -> Transformer:
    torch.manual_seed(4)
    return Transformer()


@case(2)
def transformer_in_two() -> dict[str, Any]:
    return compared(transformer, adamw, *sentences(), two_losses, TwoLosses(), microbatches=3)


@case(2)
def transformer_recomputed_by_name() -> dict[str, Any]:
    options = {"microbatches": 4, "schedule": "interleaved1f1b", "checkpoint_activations": "blocks.*"}
    return compared(transformer, adamw, *sentences(), two_losses, TwoLosses(), **options)


@case(2)
def digits_by_convnet() -> dict[str, Any]:
    loss = MeanLoss(masked)
    return compared(convnet, sgd, *digits(), masked, loss, samples=301, schedule="gpipe", microbatches=4)


def in_pieces(module: nn.Module, optimizer: Any, data: list, number: int) -> None:
    """One process with these microbatches, which BatchNorm sees."""
    for x, y in data:
        for part, target in zip(x.tensor_split(number), y.tensor_split(number), strict=True):
            (F.cross_entropy(module(part), target) * len(part) / len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()


def normed(number: int = 4, **options: Any) -> dict[str, Any]:
    x, y = digits()
    data = [*batches(x, y, 286, 26)]  # microbatches of 7, 7, 6 and 6
    one, many = convnet(True), convnet(True)
    rules = sgd(one.parameters()), sgd(many.parameters())
    in_pieces(one, rules[0], data, number)
    pipeline = Engine(microbatches=number, balance=["4"], **options)
    pipeline.start(many, x[:2])
    pipeline.adopt(rules[1])
    for batch, target in data:
        pipeline.train((batch, target, None), MeanLoss(masked))
        rules[1].step()
        rules[1].zero_grad()
    pipeline.finish()
    return {"weights": distance(one.state_dict(), many.state_dict())}


@case(2)
def batch_norm() -> dict[str, Any]:
    return normed()


@case(2)
def batch_norm_recomputed() -> dict[str, Any]:
    return normed(checkpoint_activations=True)


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


@case(2)
def inputs_changed_once() -> dict[str, Any]:
    x, _ = points()
    torch.manual_seed(7)
    module = nn.Sequential(Halve(), nn.Linear(8, 8), nn.Linear(8, 3))
    pipeline = Engine(microbatches=3)
    expected = module(x.clone())
    pipeline.start(module, x[:2].clone())
    output = pipeline.forward(x.clone(), to="all")
    pipeline.finish()
    return {"output": distance(expected, output)}


@case(2)
def accumulated() -> dict[str, Any]:
    """Three batches for each step, which are masked unevenly: each counts as its targets do."""
    x, y = points()
    data = [*batches(x, y, 48)]
    one, many = mlp(), mlp()
    rules = sgd(one.parameters()), sgd(many.parameters())
    pipeline = Engine(microbatches=3)
    pipeline.start(many, x[:2])
    pipeline.adopt(rules[1])
    for _ in range(3):
        (F.cross_entropy(one(x[:48]), y[:48])).backward()
        rules[0].step()
        rules[0].zero_grad()
        counted: list[Any] = []
        for batch, target in data:
            pipeline.train((batch, target, None), MASKED, lambda totals, to=counted: to.append(totals[""]) or {"": 40})
        for parameter in rules[1].param_groups[0]["params"]:
            parameter.grad *= 40 / sum(counted)
        rules[1].step()
        rules[1].zero_grad()
    pipeline.finish()
    return {"weights": distance(one.state_dict(), many.state_dict())}


@case(2)
def frozen_then_not() -> dict[str, Any]:
    """The first stage is frozen, then its last layer is not: shapes are the same, gradients are not."""
    x, y = points()
    data = [*batches(x, y, SAMPLES)]
    one, many = mlp(), mlp()
    rules = adamw(one.parameters()), adamw(many.parameters())
    pipeline = Engine(microbatches=3, balance=["6"])
    pipeline.start(many, x[:2])
    pipeline.adopt(rules[1])
    for trained in ((), ("4",), ("4", "0")):
        for module in (one, many):
            for name in ("0", "2", "4"):
                module.get_submodule(name).requires_grad_(name in trained)
        by_hand(one, rules[0], data, masked, epochs=1)
        in_stages(pipeline, many, rules[1], data, MASKED, epochs=1)
    pipeline.finish()
    return {
        "weights": distance(one.state_dict(), many.state_dict()),
        "frozen": distance(*([parameter.requires_grad for parameter in module.parameters()] for module in (one, many))),
    }


@case(2)
def sum_of_losses() -> dict[str, Any]:
    class Sum(MeanLoss):
        def counts(self, output: Any, target: Any, samples: int) -> dict[str, None]:
            return {"": None}

    def total(output: Tensor, target: Tensor, weight: Any = None) -> Tensor:
        return F.cross_entropy(output, target, reduction="sum") / 16

    return compared(mlp, sgd, *points(), total, Sum(total), microbatches=4)


@case(2)
def resumed() -> dict[str, Any]:
    """Plain, in stages, plain, in other stages: each takes up what the one before left."""
    x, y = points()
    data = [*batches(x, y, SAMPLES)]
    one, many = mlp(), mlp()
    rules = adamw(one.parameters()), adamw(many.parameters())
    by_hand(one, rules[0], data, masked, epochs=4)
    by_hand(many, rules[1], data, masked, epochs=1)
    pipeline = Engine(microbatches=3)
    for options in ({"microbatches": 4}, {"schedule": "interleaved1f1b", "microbatches": 2}):
        pipeline = Engine(**options)
        rules[1].zero_grad()  # those of the last step by hand are still there, and would be taken along
        pipeline.start(many, x[:2])
        pipeline.adopt(rules[1])
        in_stages(pipeline, many, rules[1], data, MASKED, epochs=1)
        pipeline.finish()
    by_hand(many, rules[1], data, masked, epochs=1)
    return {
        "weights": distance(one.state_dict(), many.state_dict()),
        "optimizer": distance(rules[0].state_dict(), rules[1].state_dict()),
    }


@case(2)
def random_numbers() -> dict[str, Any]:
    """Dropout in the first stage draws what one process draws piece by piece: shapes are found without a draw."""
    x, y = points()
    one, many = (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3)) for _ in range(2))
    many.load_state_dict(one.state_dict())
    box = [one.state_dict()]
    dist.broadcast_object_list(box, 0)
    one.load_state_dict(box[0])
    pipeline = Engine(microbatches=4, schedule="gpipe", balance=["2"])
    pipeline.start(many, x[:2])
    torch.manual_seed(5)
    for part, target in zip(x[7:47].split(10), y[7:47].split(10), strict=True):
        (F.cross_entropy(one(part), target, reduction="sum") / (y[7:47] != IGNORED).sum()).backward()
    torch.manual_seed(5)
    pipeline.train((x[7:47], y[7:47], None), MASKED)
    own = [(a.grad, b.grad) for a, b in zip(one.parameters(), many.parameters(), strict=True) if b.grad is not None]
    found = distance(*map(list, zip(*own, strict=True)))
    pipeline.finish()
    return {"gradients": found, "tensors": len(own)}


@case(2)
def lengths_that_vary() -> dict[str, Any]:
    """Shapes differ from batch to batch; more of them than schedules are kept."""
    (ids, lengths), targets = sentences()
    one, many = transformer(), transformer()
    rules = adamw(one.parameters()), adamw(many.parameters())
    lengths = lengths.clamp(max=3)
    data = [
        ((ids[:12, :size], lengths[:12]), {"tokens": targets["tokens"][:12, :size], "tag": targets["tag"][:12]})
        for size in (9, 4, 8, 5, 7, 6, 3, 9)
    ]
    seen = by_hand(one, rules[0], data, two_losses, epochs=2)
    pipeline = Engine(microbatches=4)
    pipeline.start(many, data[0][0])
    pipeline.adopt(rules[1])
    trained = in_stages(pipeline, many, rules[1], data, TwoLosses(), epochs=2)
    kept = len(pipeline._runs)
    pipeline.finish()
    return {"weights": distance(one.state_dict(), many.state_dict()), "seen": distance(seen, trained), "kept": kept}


@case(2)
def under_autocast() -> dict[str, Any]:
    """One microbatch, so that sums are of the same bfloat16s."""
    x, y = points()
    one, many = mlp(), mlp()
    rules = sgd(one.parameters()), sgd(many.parameters())
    low = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    pipeline = Engine(microbatches=1, balance=["5"])
    pipeline.start(many, x[:2], context=low)
    pipeline.adopt(rules[1])
    for _ in range(3):
        with low():
            value = masked(one(x), y)
        value.backward()
        pipeline.train((x, y, None), MASKED)
        for rule in rules:
            rule.step()
            rule.zero_grad()
    crossing = next(iter(pipeline._known.values()))
    structure = crossing.after[0] if pipeline.rank == 0 else crossing.before[1]
    pipeline.train((x, y, None), MASKED)
    largest = pipeline.clip_gradients(many.parameters(), 1e9)
    with low():
        masked(one(x), y).backward()
    assert abs(largest - nn.utils.clip_grad_norm_(one.parameters(), 1e9)) < 1e-6
    pipeline.finish()
    return {"weights": distance(one.state_dict(), many.state_dict()), "wires": str(structure[0].dtype)}


@case(2)
def refusals() -> dict[str, Any]:
    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    x, _ = points()
    pipeline, scalar = Engine(microbatches=3), Engine(microbatches=3)
    module = mlp()
    pipeline.start(module, x[:2])
    found = {
        "stages": message(lambda: Engine(stages=3).start(mlp(), x[:2])),
        "interleaved stages": message(lambda: Engine(stages=2, schedule="loopedbfs").start(mlp(), x[:2])),
        "checkpoint": message(lambda: Engine(checkpoint_activations="layers.*").start(mlp(), x[:2])),
        "lbfgs": message(lambda: pipeline.adopt(torch.optim.LBFGS(module.parameters()))),
    }
    summed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3), Sum())
    scalar.start(summed, x[:2])
    found["scalar"] = message(lambda: scalar.forward(x[:6]))
    spectra = nn.Sequential(nn.Linear(8, 8), Spectrum(), nn.Linear(8, 8), nn.Linear(8, 3))
    turned = Engine(microbatches=3, balance=["2"])
    turned.start(spectra, x[:2])
    if dist.get_rank() == 0:
        found["complex"] = message(lambda: turned.train((x[:6], x[:6, :1], None), MASKED))
    box = [found["scalar"]]
    dist.broadcast_object_list(box, scalar.last_rank)
    return found | {"scalar": box[0]}


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


# Four ranks.


@case(4)
def four_in_turn() -> dict[str, Any]:
    return mlp_case(adamw, schedule="1f1b", microbatches=6)


@case(4)
def four_interleaved() -> dict[str, Any]:
    return mlp_case(schedule="interleaved1f1b", microbatches=8)


@case(4)
def four_for_a_transformer() -> dict[str, Any]:
    return compared(transformer, adamw, *sentences(), two_losses, TwoLosses(), schedule="gpipe", microbatches=4)


def worst(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Over ranks: the largest of numbers."""
    return {
        name: max(result[name] for result in results) if isinstance(value, (int, float)) else value
        for name, value in results[0].items()
    }


def rank(number: int, ranks: int, folder: Path) -> None:
    """All cases for so many ranks."""
    store = f"file://{folder / f'meeting of {ranks}'}"
    dist.init_process_group("gloo", store, rank=number, world_size=ranks, timeout=timedelta(seconds=60))
    found = {}
    for name, (needed, run) in CASES.items():
        if needed == ranks:
            results: list[Any] = [None] * ranks
            dist.all_gather_object(results, run())
            found[name] = worst(results)
    if number == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    for count in (2, 4):
        # Forked, so that torch is imported once; nothing has been computed yet.
        start_processes(rank, (count, Path(sys.argv[1])), count, start_method="fork")
