"""TensorBoard: the event files of a run: scalars, histograms, graph, hyperparameters and the picture of its history.

Folders and tags are Keras's: `train` and `validation` have the same tags, so that the two curves are drawn as one. The
files are written by `torch.utils.tensorboard`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .files import make_folder
from .loggers import Logger, hyperparameters, leave_out, numbers_in, require


class TensorBoard(Logger):
    """Writes a run for TensorBoard: `tensorboard --logdir logs`.

    In `log_dir/train`: `epoch_loss` and so on over the epochs, counted from 0, with `epoch_learning_rate`, the rate of
    the last step, and `batch_loss` over the batches so far, means of the epoch so far. In `log_dir/validation`:
    `epoch_loss` and so on, and `evaluation_loss_vs_iterations` over the optimizer steps so far, for validations within
    epochs too, and for `evaluate`. In `log_dir` itself: the hyperparameters.

    Every fit writes files of its own beside those that are there; where both have an epoch, TensorBoard shows the later
    ones. Runs that are to be compared need folders of their own. In one that goes on from a state, batches and steps
    are counted on.

    Args:
        log_dir: Folder of the run. Default: `"logs"`.
        histogram_freq: Epochs from one histogram of each parameter and gradient to the next, from epoch 0 on: of the
            parameters after the epoch, of the gradients at its first step; 0 = none. Default: 0.
        write_graph: Whether to write the graph of the module, which is traced on the first batch: a copy of it, in
            eval mode and without autocast. Where that fails there is a warning, and no graph. Default: `True`.
        write_images: Whether to write the picture that `history.plot()` draws, at the end, where Keras has the weights
            as images. Default: `False`.
        write_steps_per_second: Whether to write `epoch_steps_per_second`, optimizer steps in the time of the epoch with
            its validation, and `batch_steps_per_second`, batches since the last one written. Default: `False`.
        update_freq: `"epoch"`, `"batch"`, or a number of batches after which to write too; that reads the device.
            Default: `"epoch"`.
    Raises:
        ValueError: an empty folder, or a frequency that is none.
        ImportError: tensorboard, or matplotlib for images, is not installed.
        OSError: before training: a folder that cannot be written to.
    Example:
        >>> import tempfile, torch, kerastorch as kt
        >>> model, x = kt.Model(torch.nn.Linear(2, 1), backend="cpu").compile("sgd", "mse"), torch.rand(8, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     board = kt.callbacks.TensorBoard(folder)
        ...     history = model.fit(x, x[:, :1], validation_split=0.5, callbacks=board, verbose=0)
        ...     sorted(name for name in os.listdir(folder) if "tfevents" not in name)
        ['train', 'validation']

    Source: names, Keras, `TensorBoard`, without profiling and embeddings.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike = "logs",
        histogram_freq: int = 0,
        write_graph: bool = True,
        write_images: bool = False,
        write_steps_per_second: bool = False,
        update_freq: str | int = "epoch",
    ) -> None:
        super().__init__(update_freq, "update_freq")
        self.needs_all_parameters = bool(histogram_freq)
        if not os.fspath(log_dir):
            raise ValueError("TensorBoard was given an empty log_dir. Give a folder, e.g. 'logs/first'.")
        if not isinstance(histogram_freq, Integral) or isinstance(histogram_freq, bool) or histogram_freq < 0:
            raise ValueError(f"histogram_freq={histogram_freq!r} is no number of epochs. Give 0 for none, or more.")
        require("tensorboard", "tensorboard", "TensorBoard")
        if write_images:
            require("matplotlib", "plot", "TensorBoard with write_images=True")
        self.log_dir, self.histogram_freq, self.write_graph = log_dir, int(histogram_freq), write_graph
        self.write_images, self.write_steps_per_second = write_images, write_steps_per_second
        self._writers: dict[str, Any] = {}
        self._hook: Any = None  # hears of the first call of the module
        self._awaited: set[Optimizer] = set()  # whose gradients are still to be written in this epoch
        self._is_fitting = self._has_begun = False
        if not histogram_freq:
            leave_out(self, TensorBoard, "on_before_optimizer_step")

    def on_epoch_begin(self, epoch: int, logs: MutableMapping | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        if self.write_graph and not self._has_begun:
            self._await_first_call()
        self._has_begun = True
        if self._is_due(epoch):
            self._awaited = {update.optimizer for update in self.model.updates.values()}
        self._epoch, self._epoch_began, self._steps_at_epoch = epoch, time.monotonic(), self._steps
        self._batch_written, self._batches_written = self._epoch_began, self._batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if optimizer in self._awaited:
            self._awaited.remove(optimizer)
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            named = self.model.module.named_parameters()
            gradients = {name: one.grad for name, one in named if id(one) in own and one.grad is not None}
            self._write_histograms("gradient_histogram", gradients)

    def on_epoch_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        if self.write_steps_per_second:
            steps, seconds = self._steps - self._steps_at_epoch, time.monotonic() - self._epoch_began
            self._write("train", {"epoch_steps_per_second": steps / max(seconds, 1e-9)}, epoch)
        if self._is_due(epoch):
            self._write_histograms("histogram", dict(self.model.module.named_parameters()))
        if self._hook is not None:
            self._forget_first_call()
            warnings.warn(
                "TensorBoard has no graph to write: in its first epoch the module itself was not called, only parts of "
                "it, or code compiled before. Give write_graph=False.",
                stacklevel=2,
            )
        self._flush()

    def on_interval_end(self, epoch: int, logs: MutableMapping | None = None) -> None:
        super().on_interval_end(epoch, logs)
        self._flush()

    def on_train_end(self, logs: MutableMapping | None = None) -> None:
        if self.write_images and self._history.epoch:
            self._write_picture()
        super().on_train_end(logs)

    def on_test_end(self, logs: MutableMapping | None = None) -> None:
        if not self._is_fitting:  # within fit, what an interruption made of the results is known later
            self._write_evaluation(numbers_in(logs))
            self._close()

    def _is_due(self, epoch: int) -> bool:
        return self.histogram_freq > 0 and epoch % self.histogram_freq == 0

    def _open(self) -> None:
        make_folder(self.model.path_for(self.log_dir), "TensorBoard")
        self._is_fitting, self._has_begun, self._awaited = True, False, set()
        self._history = self.model.history  # now: Keras's History takes its place
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # its `api` needs TensorFlow

        self._writer("").file_writer.add_summary(hparams_pb(hyperparameters(self.model, self.params)))

    def _log(self, kind: str, number: int, values: dict[str, float]) -> None:
        validation = {name.removeprefix("val_"): one for name, one in values.items() if name.startswith("val_")}
        if kind != "interval":
            training = {name: one for name, one in values.items() if not name.startswith("val_")}
            self._write("train", {f"{kind}_{name}": one for name, one in training.items()}, number)
            self._write("validation", {f"{kind}_{name}": one for name, one in validation.items()}, number)
        if kind == "batch" and self.write_steps_per_second:
            now = time.monotonic()  # after the values were read, for which the device has finished the batch
            pace = (number - self._batches_written) / max(now - self._batch_written, 1e-9)
            self._write("train", {"batch_steps_per_second": pace}, number)
            self._batch_written, self._batches_written = now, number
        self._write_evaluation(validation)

    def _close(self, error: BaseException | None = None) -> None:
        self._forget_first_call()
        self._is_fitting = False
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.close()

    def _writer(self, run: str) -> Any:
        """The `SummaryWriter` of a run's folder; there is no file before there is something to write."""
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[run] = SummaryWriter(str(self.model.path_for(self.log_dir) / run))
        return self._writers[run]

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def _write(self, run: str, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer(run).add_scalar(tag, value, step)

    def _write_evaluation(self, values: Mapping[str, float]) -> None:
        tagged = {f"evaluation_{name}_vs_iterations": value for name, value in values.items()}
        self._write("validation", tagged, self._steps)

    def _write_histograms(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            values, path = _finite(tensor.detach()), name.removeprefix("_orig_mod.").replace(".", "/")
            if values.numel():
                self._writer("train").add_histogram(f"{path}/{kind}", values, self._epoch)

    def _write_picture(self) -> None:
        history = self._history.history
        others = {
            name.removeprefix("val_") for name in history if not all(isinstance(one, Real) for one in history[name])
        }
        names = [name for name in dict.fromkeys(name.removeprefix("val_") for name in history) if name not in others]
        if names:
            self._writer("train").add_figure("history", self._history.plot(names), self._history.epoch[-1])

    def _await_first_call(self) -> None:
        # A function, not a method: a copy of the module takes it along, and this callback cannot be copied.
        def trace(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            # Traced by `torch.compile`, which may come before a call, it must be nothing.
            if not torch.compiler.is_compiling() and self._hook is not None:
                self._forget_first_call()
                self._write_graph(module, inputs, named)

        self._hook = self.model.module.register_forward_pre_hook(trace, with_kwargs=True)

    def _forget_first_call(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _write_graph(self, module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        try:
            with _undisturbed(self.model.backend.device):
                # Of a copy: nothing that a call changes, from statistics to counters, changes in the module. Its
                # memory is that of the gradients, which are not there yet.
                plain = getattr(module, "_orig_mod", module)  # the wrapper of torch.compile cannot be traced
                traced, tensors = _as_function_of_tensors(copy.deepcopy(plain), inputs, named)
                self._writer("train").add_graph(traced, tensors, use_strict_trace=False)
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(
                f"TensorBoard could not trace the module, and goes on without its graph: {reason} Give "
                f"write_graph=False to not try.",
                stacklevel=2,
            )


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random numbers come as if nothing had been called within; torch's remarks about tracing are left out."""
    with (
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),  # its cache of weights cannot be traced
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),  # `add_graph` prints its errors
    ):
        warnings.simplefilter("ignore")
        yield


class _FunctionOfTensors(nn.Module):
    """A module as a function of its tensors alone; what else it was called with is part of it."""

    def __init__(self, module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.inputs, self.named = module, inputs, named

    def forward(self, *tensors: Tensor) -> Any:
        left = iter(tensors)
        inputs = [next(left) if isinstance(one, Tensor) else one for one in self.inputs]
        named = {name: next(left) if isinstance(one, Tensor) else one for name, one in self.named.items()}
        return self.module(*inputs, **named)


def _as_function_of_tensors(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[nn.Module, tuple]:
    """What tracing takes: a module and its inputs, tensors by position."""
    given = (*inputs, *named.values())
    tensors = tuple(one for one in given if isinstance(one, Tensor))
    is_plain = not named and len(tensors) == len(given)
    return module if is_plain else _FunctionOfTensors(module, inputs, named), tensors


def _finite(tensor: Tensor) -> Tensor:
    """Its finite values as float32, those of a sparse one that it has: what a histogram can be made of."""
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    values = (torch.view_as_real(values) if values.is_complex() else values).float()
    return values[values.isfinite()]
