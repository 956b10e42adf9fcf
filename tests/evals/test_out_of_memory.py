"""Batches of tasks where memory runs out: on a GPU whose memory is taken, and what counts as running out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from linearize import demo
from linearize.errors import UserError
from linearize.evals.lm_eval_model import in_memory, out_of_memory
from linearize.hf.load import load

ROWS, WORDS = 256, 480


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.OutOfMemoryError("HIP", "two arguments"), True),
        (RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("The size of tensor a must match"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_a_smaller_batch_could_avoid(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


@contextmanager
def ballast(leave: int) -> Iterator[None]:
    """Inside the context at most `leave` bytes of the GPU's memory are free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free <= leave:
        pytest.skip("others hold the GPU's memory already")
    held = torch.empty(free - leave, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def questions(rows: int, words: int) -> list[Any]:
    """All different, since the harness asks the same only once."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["the", "cat", "saw", "a", "dog"], k=words - i % 7)) for i in range(rows)]
    assert len(set(texts)) == rows
    return [Instance("loglikelihood", {}, (text, " and went home"), i) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def teacher() -> tuple[Any, Any]:
    return load(demo.model_path(), dtype="float32", device="cuda")


def answers(lm: Any, requests: list[Any]) -> list[float]:
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.gpu
def test_batches_shrink_to_what_a_full_gpu_has(teacher: tuple[Any, Any]) -> None:
    requests = questions(ROWS, WORDS)
    expected = answers(in_memory(*teacher, 4), requests)
    lm = in_memory(*teacher, "auto")
    lm.tokens = max(lm.tokens, 2**17)  # as on a large GPU: the first batch takes all rows, whose logits are 2 GiB
    with ballast(leave=2**30):
        before = torch.cuda.memory_allocated()
        assert answers(lm, requests) == pytest.approx(expected, abs=1e-2)
        assert torch.cuda.memory_allocated() < before + 2**26, "nothing of the failed batches is held"
    assert 0 < lm.tokens <= ROWS * WORDS // 2
    assert answers(in_memory(*teacher, "auto"), requests) == pytest.approx(expected, abs=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch_size", "message"),
    [("auto", r"one row of \d+ tokens does not fit .* cuda.*num_fewshot"), (8, "8 rows .* do not fit .* or auto")],
)
def test_a_gpu_that_holds_not_even_one_row(teacher: tuple[Any, Any], batch_size: Any, message: str) -> None:
    requests = questions(16, 1500)
    lm = in_memory(*teacher, batch_size)
    answers(lm, questions(8, 8))  # so that kernels and workspaces are there
    with ballast(leave=2**22), pytest.raises(UserError, match=message):
        answers(lm, requests)
