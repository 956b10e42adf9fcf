"""Peak memory of a function and out-of-memory errors, on GPU and CPU; `linearize.bench` uses both."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]
import torch

SAMPLE_SECONDS = 0.005


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, once `device` has done all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory while `run` runs, weights included; see `memory_method`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(*seen, process.memory_info().rss)


def memory_method(device: torch.device) -> str:
    """One sentence on what `peak_bytes` measures on `device`."""
    if device.type == "cuda":
        return "largest memory allocated by torch on the GPU, weights included (torch.cuda.max_memory_allocated)"
    every = f"sampled every {SAMPLE_SECONDS * 1e3:g} ms"
    return f"largest resident set of the process, weights and libraries included, {every}"


@contextmanager
def out_of_memory() -> Iterator[list[str]]:
    """Swallow an out-of-memory error of the GPU, of a kernel on it or of torch's CPU allocator; the list then holds its
    text.
    """
    found: list[str] = []
    try:
        yield found
    except (RuntimeError, MemoryError) as error:
        known = ("can't allocate memory", "[CUDA]: out of memory")  # torch's on the CPU, triton's
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(t in str(error) for t in known):
            raise
        found.append(str(error))
    if found:
        release()


def release() -> None:
    """Give what torch keeps for reuse back to the GPU, where kernels need memory of their own to start."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
