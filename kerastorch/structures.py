"""Nested tuples, lists and dicts of tensors: several inputs, several outputs.

What counts as nesting is decided here and nowhere else; everything that is not a tuple, list or mapping is a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def map_structure(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `function` to every leaf of `tree` and keeps its structure; `None` stays `None`."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: map_structure(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a namedtuple takes its fields one by one
        return type(tree)(*(map_structure(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_structure(function, value) for value in tree)
    return function(tree)


def detached(leaf: Any) -> Any:
    """A tensor without its graph; what is no tensor stays as it is."""
    return leaf.detach() if hasattr(leaf, "detach") else leaf


def leaves(tree: Any) -> Iterator[Any]:
    """Yields the leaves of `tree` in order, `None` left out."""
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for value in tree:
            yield from leaves(value)
    elif tree is not None:
        yield tree


def samples_in(x: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    return len(x if isinstance(x, Tensor) else next(leaf for leaf in leaves(x) if isinstance(leaf, Tensor)))


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields `(path, leaf)` pairs, the path written as one would index: `x["left"][0]`."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_leaves(value, f"{name}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from named_leaves(value, f"{name}[{index}]")
    elif tree is not None:
        yield name, tree


def join(trees: list[Any], function: Callable[[list[Any]], Any]) -> Any:
    """Joins trees of one structure leaf by leaf: `function` gets the list of leaves that share a place."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {key: join([tree[key] for tree in trees], function) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(join(list(values), function) for values in zip(*trees, strict=True)))
    if isinstance(first, (tuple, list)):
        return type(first)(join(list(values), function) for values in zip(*trees, strict=True))
    return None if first is None else function(trees)
