"""Which way is better, by the names that logs have."""

import pytest

from kerastorch.directions import direction


@pytest.mark.parametrize(
    ("way", "names"),
    [
        (-1, "loss val_loss head_loss mse val_mae rmse mean_squared_error binary_crossentropy"),
        (1, "accuracy val_acc auc f1 f1_1 precision recall r2 top_5 top5_accuracy head_accuracy"),
        (0, "lr step_time temperature stop"),
    ],
)
def test_direction_follows_from_the_name(way, names):
    assert {name: direction(name) for name in names.split()} == dict.fromkeys(names.split(), way)
