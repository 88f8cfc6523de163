"""Every form of data gives the same training, evaluation and prediction; nothing of the caller's is changed."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import kerastorch as kt
from kerastorch import seeding
from tests import reference

SIZE = 32  # the batch size all forms are given


class Rows(Dataset):
    """A map-style dataset that is no TensorDataset."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays[0])

    def __getitem__(self, index):
        return tuple(array[index] for array in self.arrays)


class BatchedRows(Rows):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return zip(self.x, self.y, strict=True)


def as_dict(samples):
    xs, ys = zip(*samples, strict=True)
    return {"input": torch.stack(xs)}, torch.stack(ys)


FORMS = {
    "torch": lambda x, y: (x, y),
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "float64 numpy": lambda x, y: (x.numpy().astype(np.float64), y.numpy().astype(np.int32)),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "pandas": lambda x, y: (pandas.DataFrame(x.numpy()), pandas.Series(y.numpy())),
    "tuple": lambda x, y: ((x, y), None),
    "tuple of one input": lambda x, y: ((x,), y),
    "dict of inputs": lambda x, y: ({"input": x}, y),
    "TensorDataset": lambda x, y: (TensorDataset(x, y), None),
    "Subset": lambda x, y: (Subset(TensorDataset(torch.cat([x, x]), torch.cat([y, y])), range(len(x))), None),
    "Dataset": lambda x, y: (Rows(x, y), None),
    "Dataset of numpy": lambda x, y: (Rows(x.numpy().astype(np.float64), y.numpy()), None),
    "Dataset with __getitems__": lambda x, y: (BatchedRows(x, y), None),
    "IterableDataset": lambda x, y: (Stream(x, y), None),
    "loader over tensors": lambda x, y: (DataLoader(TensorDataset(x, y), SIZE), None),
    "loader": lambda x, y: (DataLoader(Rows(x, y), SIZE), None),
    "loader with workers": lambda x, y: (DataLoader(Rows(x, y), SIZE, num_workers=2), None),
    "loader with a collate": lambda x, y: (DataLoader(Rows(x, y), SIZE, collate_fn=as_dict), None),
    "loader with a batch sampler": lambda x, y: (
        DataLoader(Rows(x, y), batch_sampler=BatchSampler(range(len(x)), SIZE, False)),
        None,
    ),
    "list of batches": lambda x, y: (reference.cut(x, y, SIZE), None),
    "list of numpy batches": lambda x, y: ([(a.numpy(), b.numpy()) for a, b in reference.cut(x, y, SIZE)], None),
    "iterator": lambda x, y: (iter(reference.cut(x, y, SIZE)), None),
    "generator": lambda x, y: ((batch for batch in reference.cut(x, y, SIZE)), None),
    "callable": lambda x, y: (lambda: iter(reference.cut(x, y, SIZE)), None),
    "callable that gives arrays": lambda x, y: (lambda: (x, y), None),
    "Hugging Face": lambda x, y: (hugging_face({"input": x.numpy(), "label": y.numpy()}), "label"),
}
ONE_PASS = {"iterator", "generator"}


def forms(names=FORMS):
    """A test for each form; what needs another library is tested where there is one."""
    needs = {"Hugging Face": [pytest.mark.conformance]}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=needs.get(name, [])) for name in names])


# These bring their own batches; the others are told how large batches are.
BATCHED = {
    name for name in FORMS if name.startswith(("loader", "list of", "iterator", "generator")) or name == "callable"
}


def hugging_face(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def options(name):
    return {} if name in BATCHED else {"batch_size": SIZE}


@forms()
def test_every_form_trains_evaluates_and_predicts_as_the_arrays_do(name, classifier, digits):
    x, y = digits
    twin = copy.deepcopy(classifier)
    epochs = 1 if name in ONE_PASS else 2
    expected = kt.Model(twin).compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.1)
    history = expected.fit(x, y, epochs=epochs, batch_size=SIZE, shuffle=False, validation_data=(x, y), verbose=0)

    class ByName(nn.Sequential):
        def forward(self, input):
            return super().forward(input)

    model = kt.Model(ByName(*classifier)).compile("sgd", "cross_entropy", metrics=["accuracy"], lr=0.1)
    make = lambda: FORMS[name](x, y)  # noqa: E731
    data, target = make()
    held_out = make()[0] if name != "Hugging Face" and target is None else (x, y)
    if name == "Hugging Face":
        held_out = make()[0]
    arguments = {"epochs": epochs, "shuffle": False, "verbose": 0, **options(name)}
    got = model.fit(data, target, validation_data=held_out, **arguments)

    assert reference.same_weights(classifier, twin)
    for key, values in history.history.items():
        assert got.history[key] == pytest.approx(values, abs=1e-6)
    data, target = make()
    assert model.evaluate(data, target, verbose=0, **options(name)) == pytest.approx(expected.evaluate(x, y, verbose=0))
    data, _ = make()
    predicted = model.predict(data, verbose=0, **options(name))
    is_numpy = name in ("numpy", "float64 numpy", "lists", "pandas")
    assert isinstance(predicted, np.ndarray if is_numpy else torch.Tensor)
    assert torch.allclose(torch.as_tensor(predicted), expected.predict(x, verbose=0), atol=1e-6)


@forms(["torch", "Dataset", "TensorDataset", "Hugging Face"])
def test_shuffling_has_the_order_of_the_seed_in_every_form(name, classifier, digits):
    x, y = digits
    expected, _ = reference.train(
        classifier,
        lambda epoch: reference.cut(x, y, SIZE, seeding.epoch_order(len(x), epoch)),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        F.cross_entropy,
        epochs=2,
    )
    data, target = FORMS[name](x, y)
    kt.Model(classifier).compile("sgd", "cross_entropy", lr=0.1).fit(data, target, epochs=2, batch_size=SIZE, verbose=0)
    assert reference.same_weights(classifier, expected)


@pytest.mark.parametrize(
    "loader_over",
    [
        lambda data: DataLoader(data, 32, shuffle=True),
        lambda data: DataLoader(data, 32, shuffle=True, drop_last=True),
        lambda data: DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(7)),
        lambda data: DataLoader(data, 32, sampler=WeightedRandomSampler(torch.arange(len(data)) + 1.0, 100)),
        lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 20, False)),
        lambda data: DataLoader(Subset(data, range(10, 120)), 32, shuffle=True),
        lambda data: DataLoader(random_split(data, [100, len(data) - 100])[0], 32, shuffle=True),
    ],
)
def test_a_loader_over_tensors_is_seen_through_with_its_order_and_random_numbers_kept(loader_over, digits):
    net = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))
    data = TensorDataset(*digits)

    def seeded_loader():
        torch.manual_seed(11)
        return loader_over(data)

    loader = seeded_loader()
    expected, losses = reference.train(
        net,
        lambda epoch: loader,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        F.cross_entropy,
        epochs=3,
    )
    drawn = torch.rand(1)
    history = kt.Model(net).compile("sgd", "cross_entropy", lr=0.1).fit(seeded_loader(), epochs=3, verbose=0)
    assert reference.same_weights(net, expected)
    assert history.history["loss"] == pytest.approx(losses, abs=1e-6)
    assert torch.equal(torch.rand(1), drawn), "as many random numbers were drawn as by hand"


def test_a_loader_over_tensors_calls_no_getitem(digits, monkeypatch, classifier):
    monkeypatch.setattr(TensorDataset, "__getitem__", None)
    loader = DataLoader(TensorDataset(*digits), 32)
    kt.Model(classifier).compile("sgd", "cross_entropy").fit(loader, verbose=0)


@pytest.mark.parametrize(
    "loader_over",
    [
        lambda data, rows: DataLoader(Subset(data, rows), 8),
        lambda data, rows: DataLoader(data, 8, sampler=SubsetRandomSampler(rows)),
        lambda data, rows: DataLoader(data, batch_sampler=BatchSampler(rows, 8, False)),
    ],
    ids=["subset", "sampler", "batch sampler"],
)
def test_targets_that_a_loader_leaves_out_may_be_anything(loader_over, digits):
    x, y = digits
    loader = loader_over(TensorDataset(x, y), (y < 3).nonzero().squeeze(1).tolist())
    model = kt.Model(nn.Linear(64, 3)).compile("sgd", "cross_entropy")
    assert np.isfinite(model.fit(loader, verbose=0).history["loss"][0])


def test_a_subclass_of_tensor_dataset_is_not_seen_through(digits):
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return 2 * x, y

    x, y = digits
    model = kt.Model(nn.Identity())
    for data in (Doubled(x, y), DataLoader(Doubled(x, y), 32)):
        assert torch.equal(model.predict(data, verbose=0), 2 * x)


def test_the_callers_arrays_and_loaders_are_left_as_they_are(classifier, digits):
    x, y = digits[0].numpy().astype(np.float64), digits[1].numpy().astype(np.int16)
    before = x.copy(), y.copy()
    x.flags.writeable = y.flags.writeable = False
    loader = DataLoader(TensorDataset(*digits), 32, shuffle=True)
    settings = dict(vars(loader))
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(x, y, validation_split=0.2, class_weight={0: 2.0}, verbose=0)
        model.fit(loader, validation_split=0.2, class_weight={0: 2.0}, verbose=0)
    assert (x == before[0]).all() and (y == before[1]).all() and x.dtype == np.float64
    assert vars(loader) == settings


@pytest.mark.parametrize(
    "x",
    [
        np.asfortranarray(np.random.default_rng(0).random((20, 3))),
        np.random.default_rng(0).random((20, 3))[::-1],
        np.random.default_rng(0).random((20, 3)).astype(">f8"),
        np.random.default_rng(0).integers(0, 255, (20, 3)).astype(np.uint16),
    ],
    ids=["fortran", "negative strides", "big endian", "uint16"],
)
def test_unusual_memory_layouts_are_read_right(x):
    class ToFloat(nn.Module):
        def forward(self, x):
            return x.float()

    assert np.allclose(kt.Model(ToFloat()).predict(x, verbose=0), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memory_maps_are_read_without_loading_them(dtype, tmp_path, regressor, monkeypatch):
    x = np.memmap(tmp_path / "x", dtype=dtype, mode="w+", shape=(90, 10))
    x[:] = np.random.default_rng(0).random((90, 10))
    x.flush()
    mapped = np.memmap(tmp_path / "x", dtype=dtype, mode="r", shape=(90, 10))
    y, twin = np.ones((90, 1)), copy.deepcopy(regressor)
    whole = kt.Model(twin).compile("sgd", "mse")
    expected = whole.fit(np.array(x), y, epochs=2, validation_split=0.1, verbose=0)
    converted = []
    original = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: converted.append(self.numel()) or original(self, *a, **k)
    )
    model = kt.Model(regressor).compile("sgd", "mse")
    history = model.fit(mapped, y.astype(np.float32), epochs=2, validation_split=0.1, verbose=0)
    assert history.history == expected.history and reference.same_weights(regressor, twin)
    assert max(converted) <= 320, "never more than a batch of 32 rows at once"
    assert np.array_equal(model.predict(mapped, verbose=0), whole.predict(np.array(x), verbose=0))


def test_a_float64_module_gets_float64():
    net = nn.Linear(3, 1).double()
    history = (
        kt.Model(net).compile("sgd", "mse").fit(np.ones((4, 3), np.float32), np.ones((4, 1), np.float32), verbose=0)
    )
    assert np.isfinite(history.history["loss"][0]) and net.weight.dtype == torch.float64


def test_pandas_missing_values_in_nullable_columns_are_numbers():
    frame = pandas.DataFrame({"a": pandas.array([1, 2, 3, 4], dtype="Int64"), "b": [0.5, 1.5, 2.5, 3.5]})
    assert np.array_equal(kt.Model(nn.Identity()).predict(frame, verbose=0), frame.to_numpy(dtype=np.float32))


def test_several_inputs_and_outputs_keep_their_structure():
    class Net(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "pair": (a, b[:, :1])}

    a, b = np.random.default_rng(0).random((2, 50, 3)).astype(np.float32)
    model = kt.Model(Net())
    for inputs in ((a, b), [a, b], {"b": b, "a": a}):
        outputs = model.predict(inputs, batch_size=8, verbose=0)
        assert np.array_equal(outputs["sum"], a + b)
        assert isinstance(outputs["pair"], tuple) and np.array_equal(outputs["pair"][1], b[:, :1])


def test_a_list_of_arrays_is_several_inputs_or_else_batches():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    x = torch.rand(6, 2)
    assert torch.equal(kt.Model(Sum()).predict([x, x], verbose=0), 2 * x)
    assert torch.equal(kt.Model(nn.Identity()).predict([x[:4], x[4:]], verbose=0), x)
    assert np.array_equal(kt.Model(nn.Identity()).predict([[1.0, 2.0], [3.0, 4.0]], verbose=0), [[1, 2], [3, 4]])


def test_predict_leaves_the_targets_of_every_form_aside(digits, classifier):
    x, y = digits
    model = kt.Model(classifier)
    expected = model.predict(x, verbose=0)
    for data in (
        (x, y),
        (x, y, torch.ones(len(x))),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), 32),
        [(x, y)],
    ):
        assert torch.allclose(model.predict(data, verbose=0), expected, atol=1e-6)


def test_a_generator_may_use_its_arrays_again(classifier, digits):
    x, y = digits[0].numpy(), digits[1].numpy()

    def reusing():
        inputs, targets = np.empty((50, 64), np.float32), np.empty(50, np.int64)
        for start in (0, 50, 100):
            inputs[:], targets[:] = x[start : start + 50], y[start : start + 50]
            yield inputs, targets

    model = kt.Model(classifier).compile("sgd", "cross_entropy", metrics=["accuracy"])
    assert model.evaluate(reusing(), verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0))


def test_whole_numbers_for_a_layer_of_floats_are_one_clear_error(classifier, digits):
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    x, y = (digits[0] * 16).long(), digits[1]
    for use in (lambda: model.fit(x, y, verbose=0), lambda: model.evaluate(x, y, verbose=0), lambda: model.predict(x)):
        with pytest.raises(TypeError, match="module computes in torch.float32.*Give inputs of the dtype"):
            use()


# Splitting.


@forms(
    [
        "torch",
        "numpy",
        "pandas",
        "lists",
        "tuple",
        "TensorDataset",
        "Dataset",
        "loader",
        "loader over tensors",
        "Hugging Face",
    ]
)
def test_validation_split_takes_the_tail_before_shuffling(name, classifier, digits):
    x, y = digits
    twin = copy.deepcopy(classifier)
    expected = kt.Model(twin).compile("sgd", "cross_entropy", lr=0.1)
    shuffle = "loader" not in name
    settings = {"epochs": 2, "shuffle": shuffle, "verbose": 0}
    cut = int(150 * (1 - 0.3))
    history = expected.fit(x[:cut], y[:cut], validation_data=(x[cut:], y[cut:]), batch_size=SIZE, **settings)
    data, target = FORMS[name](x, y)
    got = kt.Model(classifier).compile("sgd", "cross_entropy", lr=0.1)
    got = got.fit(data, target, validation_split=0.3, **settings, **options(name))
    assert reference.same_weights(classifier, twin)
    assert got.history["val_loss"] == pytest.approx(history.history["val_loss"], abs=1e-6)


def test_a_split_loader_keeps_its_settings(digits):
    from kerastorch.data import split_tail

    loader = DataLoader(Rows(*digits), 16, shuffle=True, drop_last=True, collate_fn=as_dict, num_workers=1)
    (train, _, _), (validation, _, _) = split_tail(loader, None, None, 0.2)
    assert isinstance(train.sampler, RandomSampler) and not isinstance(validation.sampler, RandomSampler)
    for part in (train, validation):
        assert (part.batch_size, part.num_workers, part.collate_fn) == (16, 1, as_dict)
    assert train.drop_last and not validation.drop_last, "all held-out samples are measured"
    assert (len(train.dataset), len(validation.dataset)) == (120, 30)


# Weights.


def weighted_by_hand(net, x, y, weight, epochs=2):
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.arange(len(x)).split(SIZE):
            optimizer.zero_grad()
            loss = (F.cross_entropy(net(x[rows]), y[rows], reduction="none") * weight[rows]).sum() / len(rows)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
    return net, losses


@forms()
def test_class_weight_weighs_the_loss_in_every_form(name, classifier, digits):
    x, y = digits
    weights = {0: 3.0, 4: 0.5, 9: 0.0}
    each = torch.tensor([weights.get(int(index), 1.0) for index in y])
    epochs = 1 if name in ONE_PASS else 2
    expected, losses = weighted_by_hand(classifier, x, y, each, epochs)

    class ByName(nn.Sequential):
        def forward(self, input):
            return super().forward(input)

    data, target = FORMS[name](x, y)
    model = kt.Model(ByName(*classifier)).compile("sgd", "cross_entropy", lr=0.1)
    history = model.fit(data, target, class_weight=weights, epochs=epochs, shuffle=False, verbose=0, **options(name))
    assert history.history["loss"] == pytest.approx(losses, abs=1e-5)
    for parameter, other in zip(classifier.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(parameter, other, atol=1e-6)


def test_sample_weights_come_as_an_argument_or_with_the_batches(classifier, digits):
    x, y = digits
    weight = torch.linspace(0, 2, len(x))
    _, losses = weighted_by_hand(classifier, x, y, weight)
    batches = [(x[rows], y[rows], weight[rows]) for rows in torch.arange(len(x)).split(SIZE)]
    forms = [
        ((x, y), {"sample_weight": weight, "batch_size": SIZE}),
        ((x.numpy(), y.numpy()), {"sample_weight": weight.tolist(), "batch_size": SIZE}),
        (((x, y, weight),), {"batch_size": SIZE}),
        ((TensorDataset(x, y, weight),), {"batch_size": SIZE}),
        ((DataLoader(TensorDataset(x, y, weight), SIZE),), {}),
        ((batches,), {}),
    ]
    for arguments, named in forms:
        model = kt.Model(copy.deepcopy(classifier)).compile("sgd", "cross_entropy", lr=0.1)
        history = model.fit(*arguments, **named, epochs=2, shuffle=False, verbose=0)
        assert history.history["loss"] == pytest.approx(losses, abs=1e-5)
        each = F.cross_entropy(model.module(x), y, reduction="none")
        assert model.evaluate(*arguments, **named, verbose=0) == pytest.approx((each * weight).mean().item(), abs=1e-5)


def test_class_and_sample_weights_multiply(classifier, digits):
    x, y = digits
    weight = torch.linspace(0, 2, len(x))
    _, losses = weighted_by_hand(classifier, x, y, weight * torch.where(y == 3, 2.0, 1.0))
    model = kt.Model(classifier).compile("sgd", "cross_entropy", lr=0.1)
    arguments = {"sample_weight": weight, "class_weight": {3: 2.0}, "batch_size": SIZE}
    assert model.fit(x, y, epochs=2, shuffle=False, verbose=0, **arguments).history["loss"] == pytest.approx(
        losses, abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_one_hot_targets_have_class_weights_too(dtype, classifier, digits):
    x, y = digits
    _, losses = weighted_by_hand(classifier, x, y, torch.where(y == 3, 2.0, 1.0))
    model = kt.Model(classifier).compile("sgd", "cross_entropy", lr=0.1)
    history = model.fit(
        x, F.one_hot(y, 10).to(dtype), class_weight={3: 2.0}, batch_size=SIZE, epochs=2, shuffle=False, verbose=0
    )
    assert history.history["loss"] == pytest.approx(losses, abs=1e-5)


# Mistakes.


@pytest.mark.parametrize(
    ("data", "y", "error", "message"),
    [
        (torch.rand(5, 3), torch.rand(4, 1), ValueError, "x has 5 samples, y has 4 samples"),
        (torch.rand(0, 3), torch.rand(0, 1), ValueError, "the data is empty"),
        ([], [], ValueError, "the data is empty"),
        (iter([]), None, ValueError, "the data is empty"),
        (TensorDataset(torch.rand(0, 3)), None, ValueError, "the data is empty"),
        (torch.rand(5, 3), 10, TypeError, "Did you mean epochs=10"),
        (torch.rand(5, 3), None, ValueError, "the data has no targets"),
        (TensorDataset(torch.rand(5, 3)), None, ValueError, "the data has no targets"),
        (
            DataLoader(TensorDataset(torch.rand(5, 3), torch.rand(5, 1))),
            torch.rand(5, 1),
            TypeError,
            "y was given beside",
        ),
        (3.0, None, TypeError, "data is a float"),
        ({1, 2}, None, TypeError, "a batch is a int"),
        (np.array(["a", "b"]), np.array([0.0, 1.0]), TypeError, "expected numbers"),
        (pandas.DataFrame({"a": [1.0], "name": ["x"]}), np.array([[0.0]]), TypeError, r"no numbers: \['name'\]"),
        ([(torch.rand(2, 3),) * 4], None, TypeError, "a batch is a tuple of 4; expected x, \\(x, y\\)"),
    ],
)
def test_wrong_data_is_one_clear_error(data, y, error, message):
    net = nn.Linear(3, 1)
    before = copy.deepcopy(net)
    model = kt.Model(net).compile("sgd", "mse")
    with pytest.raises(error, match=message):
        model.fit(data, y, verbose=0)
    assert reference.same_weights(net, before) and not model.optimizer.state


def test_a_batch_size_for_data_that_brings_its_own_is_refused(digits, classifier):
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    for data in (DataLoader(TensorDataset(*digits), 32), [digits]):
        with pytest.raises(ValueError, match="brings its own batches"):
            model.fit(data, batch_size=16, verbose=0)


def test_what_has_no_order_cannot_be_split(digits, classifier):
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    for data in (Stream(*digits), iter([digits]), DataLoader(Stream(*digits), 4)):
        with pytest.raises(ValueError, match="validation_data"):
            model.fit(data, validation_split=0.2, verbose=0)
    own = DataLoader(TensorDataset(*digits), sampler=WeightedRandomSampler(torch.ones(150), 150))
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        model.fit(own, validation_split=0.2, verbose=0)


def test_a_generator_cannot_validate_twice(digits, classifier):
    model = kt.Model(classifier).compile("sgd", "cross_entropy")
    with pytest.raises(ValueError, match="ends after the first of several validations"):
        model.fit(*digits, epochs=3, validation_data=iter([digits]), verbose=0)


def test_missing_values_are_named_once_by_column(regressor):
    x = np.ones((6, 10), np.float32)
    x[2, 4] = x[3, 4] = x[1, 7] = np.nan
    frame = pandas.DataFrame(x, columns=[f"c{index}" for index in range(10)])
    model = kt.Model(regressor).compile("sgd", "mse")
    with pytest.warns(UserWarning, match="x has 3 NaN in columns 4, 7"):
        model.evaluate(x, np.ones((6, 1)), verbose=0)
    with pytest.warns(UserWarning, match="x has 3 NaN in columns 'c4', 'c7'"):
        model.evaluate(frame, np.ones((6, 1)), verbose=0)
    with pytest.warns(UserWarning, match="x has 3 NaN in columns 4, 7") as caught:
        model.fit(DataLoader(Rows(torch.tensor(x), torch.ones(6, 1)), 6), epochs=2, verbose=0)
    assert len([one for one in caught if "x has" in str(one.message)]) == 1
    with pytest.warns(UserWarning, match="x has 3 NaN in columns 4, 7"):
        model.fit(DataLoader(TensorDataset(torch.tensor(x), torch.ones(6, 1)), 6), verbose=0)
    with pytest.warns(UserWarning, match="y has 1 NaN"):
        model.evaluate(np.ones((2, 10)), np.array([[1.0], [np.nan]]), verbose=0)


def test_infinite_values_are_no_missing_values(regressor):
    x = np.full((4, 10), np.inf, np.float32)
    x[0] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kt.Model(regressor).compile("sgd", "mse").evaluate(x, np.ones((4, 1)), verbose=0)


@pytest.mark.conformance
def test_a_target_column_that_is_not_there_is_named(digits):
    data = hugging_face({"input": digits[0].numpy(), "kind": digits[1].numpy()})
    with pytest.raises(ValueError, match="y='label' names no column of the data, which has 'input', 'kind'"):
        kt.Model(nn.Linear(64, 10)).compile("sgd", "cross_entropy").fit(data, "label", verbose=0)


def test_evaluation_batches_are_larger_only_where_nobody_could_tell(digits, classifier):
    sizes = []

    class Watch(nn.Sequential):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    x, y = digits
    counting = kt.callbacks.Callback()
    model = kt.Model(Watch(*classifier)).compile("sgd", "cross_entropy", metrics=["accuracy"])

    def sizes_of(verb, *arguments, **named):
        sizes.clear()
        verb(*arguments, verbose=0, **named)
        return sizes[:]

    assert sizes_of(model.evaluate, x, y) == sizes_of(model.predict, x) == [150]
    assert sizes_of(model.evaluate, x, y, batch_size=64) == sizes_of(model.predict, x, batch_size=64) == [64, 64, 22]
    assert sizes_of(model.evaluate, x, y, steps=2) == [32, 32]
    assert sizes_of(model.evaluate, Rows(x, y)) == [32, 32, 32, 32, 22], "what a sample holds is not known before"
    assert set(sizes_of(model.predict, x.repeat(7, 1))) == {512, 26}
    type(counting).on_test_batch_end, kept = lambda *_: None, type(counting).on_test_batch_end
    try:
        assert sizes_of(model.evaluate, x, y, callbacks=counting) == [32, 32, 32, 32, 22]
    finally:
        type(counting).on_test_batch_end = kept
    model.compile("sgd", lambda output, target: output.mean())
    assert sizes_of(model.evaluate, x, y) == [32, 32, 32, 32, 22]


@pytest.mark.parametrize(
    "x", [torch.zeros(70, 3, dtype=torch.long), torch.rand(70, 3, 40, 40)], ids=["tokens", "large"]
)
def test_tokens_and_large_samples_are_evaluated_in_batches_of_32(x):
    sizes = []

    class Watch(nn.Identity):
        def forward(self, x):
            sizes.append(len(x))
            return x

    kt.Model(Watch()).predict(x, verbose=0)
    assert sizes == [32, 32, 6]
