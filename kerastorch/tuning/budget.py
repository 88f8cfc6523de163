"""How much memory training may take, and how much a trial took at most.

On a GPU that is what torch's allocator holds. On the CPU it is the process's resident memory, and what is free is what
neither the machine, nor its container, nor a limit of the process takes away: running out of it ends the process there,
with no error to catch.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ..memory import free_memory

RESERVE = 0.1  # of what is free on the host: others live there, too
SLACK_BYTES = 2**28  # virtual memory that a process sets aside without ever filling it: stacks of threads, arenas
SAMPLED_S = 0.002
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def as_bytes(memory: Any) -> int | None:
    """An amount of memory as a number of bytes.

    Args:
        memory: A number of bytes, or a text such as `"2GB"` (10**9), `"512MiB"` (2**20), `"1.5 GB"`; `None` stays so.
    Raises:
        ValueError, TypeError: it is none of these, or not above 0.
    Example:
        >>> as_bytes("2GB"), as_bytes("1.5 KiB"), as_bytes(1000)
        (2000000000, 1536, 1000)
    """
    if memory is None:
        return None
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", memory.lower())
        found = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    elif isinstance(memory, Integral) and not isinstance(memory, bool):
        found = int(memory)
    else:
        raise TypeError(
            f"memory={memory!r} is a {type(memory).__name__}. Give bytes (2_000_000_000) or a text ('2GB')."
        )
    if found < 1:
        raise ValueError(f"memory={memory!r} is no amount of memory. Give bytes (2_000_000_000) or a text ('2GB').")
    return found


def in_words(bytes_: float) -> str:
    """Bytes as people read them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if bytes_ >= size:
            return f"{bytes_ / size:.3g} {unit}" if bytes_ < 1000 * size else f"{bytes_ / size:.0f} {unit}"
    return f"{bytes_:.0f} B"


def free_bytes(device: torch.device, processes: int = 1) -> int | None:
    """What training may take beyond what this process has now; `None` = the device does not tell.

    Args:
        device: Where.
        processes: How many share the host's memory.
    """
    if device.type == "cpu":
        shared = min(_free_on_host()) * (1 - RESERVE) / processes
        return int(min([shared, *_free_by_limits()]))
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def _free_on_host() -> Iterator[float]:
    import psutil

    yield psutil.virtual_memory().available
    yield from _free_in_containers()


def _free_by_limits() -> Iterator[float]:
    """What the limits of this process leave, of which others take nothing."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    import psutil

    used = psutil.Process().memory_info()
    for limit, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", used.rss))):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield max(most - taken, 0)


def _free_in_containers(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """What the control groups of this process, and those they are in, leave free.

    Source: Linux, "Control Group v2", memory.max and memory.current; of these, `inactive_file` is given back on demand.
    """
    lines = of.read_text().splitlines() if of.exists() else []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        is_second = number == "0"
        if not is_second and "memory" not in controllers.split(","):
            continue
        top = root if is_second else root / "memory"
        names = ("memory.max", "memory.current") if is_second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(top) and all((folder / name).exists() for name in names):
                most, used = ((folder / name).read_text().strip() for name in names)
                if most != "max":
                    yield max(int(most) - int(used) + _given_back(folder / "memory.stat"), 0)


def _given_back(stat: Path) -> int:
    found = re.search(r"^inactive_file (\d+)", stat.read_text() if stat.exists() else "", re.MULTILINE)
    return int(found[1]) if found else 0


class Peak:
    """The most memory that is taken within, beyond what was there: `bytes`, known when it has ended.

    Source: Linux, proc(5): writing 5 to `clear_refs` sets the peak of the resident size (`VmHWM`) back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        free_memory(self.device)
        if self.device.type in ("cuda", "xpu"):
            module = torch.get_device_module(self.device)
            module.reset_peak_memory_stats(self.device)
            self._before = module.memory_reserved(self.device)
            return self
        is_forgotten = self.device.type == "cpu" and _forget_peak()
        self._sampler = None if is_forgotten else _Sampler(self.device)
        self._noted = 0 if is_forgotten else _noted_peak(self.device)
        self._before = level(self.device)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type in ("cuda", "xpu"):
            most = torch.get_device_module(self.device).max_memory_reserved(self.device)
        else:
            sampled, noted = 0 if self._sampler is None else self._sampler.end(), _noted_peak(self.device)
            # Where none could be forgotten, only one above all those before was noted.
            most = noted if noted > self._noted else sampled
        self.bytes = max(most - self._before, 0)


def level(device: torch.device) -> int:
    """Bytes that this process has now."""
    import psutil

    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss if device.type == "cpu" else 0


def _forget_peak() -> bool:
    """Whether the system notes the peak of this process from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _noted_peak(device: torch.device) -> int:
    """The most that this process has had since it began, or since that was forgotten; 0 = nobody notes it."""
    status = Path("/proc/self/status")
    text = status.read_text() if device.type == "cpu" and status.exists() else ""
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class _Sampler:
    """Looks at the level again and again, where nobody notes its peak: what lasts less than `SAMPLED_S` it may miss."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._most, self._is_over = device, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._is_over.wait(SAMPLED_S):
            self._most = max(self._most, level(self._device))

    def end(self) -> int:
        self._is_over.set()
        self._thread.join()
        return max(self._most, level(self._device))


@contextmanager
def limited(device: torch.device, budget: int | None) -> Iterator[None]:
    """On the CPU of Linux, who takes much more than the budget gets an error, instead of the process its end.

    Source: Linux, getrlimit(2), RLIMIT_DATA, which counts private mappings since 4.7.
    """
    import psutil

    used = getattr(psutil.Process().memory_info(), "data", None) if device.type == "cpu" else None
    if used is None or budget is None:
        yield
        return
    import resource

    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + budget + SLACK_BYTES
    known = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
