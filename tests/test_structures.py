"""Nested tuples, lists and dicts: what is a leaf, what order leaves have, and that structure is kept."""

from collections import OrderedDict, namedtuple

import pytest

from kerastorch.structures import join, leaves, map_structure, named_leaves

Pair = namedtuple("Pair", "left right")
TREE = {"a": (1, [2, None]), "b": Pair(3, {"c": 4}), "d": ()}


def test_map_structure_keeps_every_kind_of_nesting() -> None:
    mapped = map_structure(lambda leaf: leaf * 10, TREE)
    assert mapped == {"a": (10, [20, None]), "b": Pair(30, {"c": 40}), "d": ()}
    assert type(mapped["b"]) is Pair and type(mapped["a"]) is tuple and type(mapped["a"][1]) is list


def test_nothing_is_mapped_where_there_is_nothing() -> None:
    assert map_structure(pytest.fail, None) is None
    assert map_structure(pytest.fail, {"a": [None]}) == {"a": [None]}


def test_any_mapping_becomes_a_dict_in_its_order() -> None:
    mapped = map_structure(str, OrderedDict(b=1, a=2))
    assert list(mapped.items()) == [("b", "1"), ("a", "2")]


def test_strings_and_other_objects_are_leaves() -> None:
    assert list(leaves(["ab", {1, 2}, range(2)])) == ["ab", {1, 2}, range(2)]
    assert map_structure(len, ("ab", "c")) == (2, 1)


def test_leaves_come_in_order_without_none() -> None:
    assert list(leaves(TREE)) == [1, 2, 3, 4]
    assert list(leaves(None)) == list(leaves({})) == []


def test_named_leaves_are_written_as_one_would_index() -> None:
    named = dict(named_leaves({"a": (1, [2, None])}, "x"))
    assert named == {"x['a'][0]": 1, "x['a'][1][0]": 2}
    x = {"a": (1, [2, None])}
    assert all(eval(name, {"x": x}) == leaf for name, leaf in named.items())
    assert list(named_leaves(7, "y")) == [("y", 7)]


def test_join_gives_the_leaves_of_each_place_to_the_function() -> None:
    trees = [{"a": (n, None), "b": Pair(n + 1, [n + 2])} for n in (0, 10)]
    assert join(trees, sum) == {"a": (10, None), "b": Pair(12, [14])}
    assert type(join(trees, sum)["b"]) is Pair
    assert join([1, 2, 3], list) == [1, 2, 3]


def test_join_refuses_trees_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="zip"):
        join([(1, 2), (3,)], sum)
