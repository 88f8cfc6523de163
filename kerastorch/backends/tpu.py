"""XLA devices, TPUs above all, by torch_xla: operations are only written down, and run as one program for each step.

Decided here: where the graph is cut, which is before each batch is handed out, and how data and parameters are laid
over several cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..structures import map_structure
from .single import Single


class TPU(Single):
    def __init__(self, cores="auto", *, shard=None):
        import torch_xla
        import torch_xla.runtime as xr
        self.xla = torch_xla
        n = xr.global_runtime_device_count()
        if n > 1 and cores == "auto":
            xr.use_spmd()
        self.device = torch.ones(1, device=torch_xla.device()).device
        self.mesh = None
        self.shard = shard
        if n > 1 and cores == "auto":
            import torch_xla.distributed.spmd as xs
            self.mesh = xs.Mesh(list(range(n)), (n,), ("cores",))

    looks_ahead = False

    def place(self, module: nn.Module) -> nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            module.to(self.device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        if self.shard:
            import torch_xla.distributed.spmd as xs
            n = len(self.mesh.device_ids)
            for p in module.parameters():
                dims = [d for d in range(p.ndim) if p.shape[d] % n == 0]
                if dims:
                    best = max(dims, key=lambda d: p.shape[d])
                    xs.mark_sharding(p, self.mesh, tuple("cores" if d == best else None for d in range(p.ndim)))
        return module

    def hold(self, tensors):
        return tensors

    def feed(self, batches: Iterable[Any]) -> Iterator[Any]:
        self.xla.sync()
        for batch in batches:
            yield self.move(batch)
            self.xla.sync()

    def move(self, tree: Any) -> Any:
        if self.mesh is None:
            return map_structure(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, tree)
        import torch_xla.core.xla_model as xm
        import torch_xla.distributed.spmd as xs
        def send(t):
            if not isinstance(t, Tensor) or t.device.type == "xla":
                return t
            spec = xs.ShardingSpec(self.mesh, ("cores",) + (None,) * (t.ndim - 1)) if t.ndim else None
            return xm.send_cpu_data_to_device(t, self.device, input_sharding=spec)[0]
        return map_structure(send, tree)
