"""The torch chunk forms against the fla kernels on a GPU, forward and backward."""

import math

import pytest
import torch
from op_cases import CASES, Case, as_leaves, assert_close, document_rows, gradients

pytestmark = pytest.mark.gpu


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """The kernels multiply float32 through TF32 (10 bits of mantissa) and bfloat16 with 8, and add up over the row.
    Delta rules also solve a triangular system in that precision.
    """
    if dtype == torch.bfloat16:
        return 3e-2
    return 1e-2 if case.recurrence.unit_keys else 5e-3


WITH_KERNEL = [case for case in CASES if case.recurrence.kernel is not None]
GATED = [case for case in WITH_KERNEL if case.decay != "none"]


def _room(config) -> tuple[int, int]:
    """Grows with the shared memory that a configuration takes: block sizes, and loads ahead."""
    blocks = math.prod(size for size in config.kwargs.values() if isinstance(size, int) and size > 1)
    return blocks, config.num_stages


@pytest.fixture(scope="module", autouse=True)
def smallest_configuration_only():
    """Keeps triton from compiling and timing dozens of configurations per kernel, which takes minutes. Some take more
    shared memory than there is, which triton's own choice passes over.
    """
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    original = autotuner.__init__

    def with_one(self, fn, arg_names, configs, *args, **kwargs):
        original(self, fn, arg_names, [min(configs, key=_room)], *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotuner, "__init__", with_one)
        yield


def cuda_inputs(case: Case, T: int, K: int, dtype: torch.dtype, V: int | None = None) -> list[torch.Tensor]:
    inputs = case.inputs(2, T, H=2, K=K, V=V or K)
    converted = [x.to("cuda", dtype) for x in inputs[:3]] + [x.cuda() for x in inputs[3:]]
    return [x.requires_grad_() for x in converted]


def compare(case: Case, inputs: list[torch.Tensor], within: float, **options) -> None:
    """fla against torch: values, with and without gradients (a kernel of its own for some), dtypes and gradients."""
    expected, expected_after = case.run(inputs, backend="torch", **options)
    with torch.no_grad():
        alone, _ = case.run(inputs, backend="fla", **options)
    outputs, after = case.run(inputs, backend="fla", **options)
    results, truths = [*outputs, *after], [*expected, *expected_after]
    assert [x.dtype for x in results] == [x.dtype for x in truths]
    assert_close(results, truths, within)
    assert_close(alone, expected, within)
    assert_close(gradients(outputs, inputs), gradients(expected, inputs), within)


@pytest.mark.parametrize("case", WITH_KERNEL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("T", [1000, 4096])
def test_fla_kernel_equals_torch_chunk(case: Case, T: int, K: int, dtype: torch.dtype):
    inputs = cuda_inputs(case, T, K, dtype)
    _, state = case.run([x[:, :100].detach() for x in inputs], backend="torch")
    compare(case, inputs, tolerance(case, dtype), state=state)


@pytest.mark.parametrize("case", WITH_KERNEL, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fla_kernel_takes_twice_as_many_features_as_values(case: Case, dtype: torch.dtype):
    """Hedgehog's features of heads of 128 channels."""
    compare(case, cuda_inputs(case, 1000, 256, dtype, V=128), tolerance(case, dtype))


@pytest.mark.parametrize("case", WITH_KERNEL, ids=lambda case: case.name)
def test_fla_kernel_honours_documents(case: Case):
    documents = document_rows([[200, 1, 99, 700], [64, 936]]).cuda()
    inputs = cuda_inputs(case, 1000, 64, torch.float32)
    compare(case, inputs, tolerance(case, torch.float32), documents=documents)


@pytest.mark.parametrize("case", GATED, ids=lambda case: case.name)
def test_fla_kernel_is_safe_under_strong_decay(case: Case):
    inputs = cuda_inputs(case, 1000, 64, torch.float32)
    inputs[3] = case.log_decay(2, 1000, 2, 64, -20.0).cuda().requires_grad_()
    compare(case, inputs, tolerance(case, torch.float32))


@pytest.mark.parametrize("case", WITH_KERNEL, ids=lambda case: case.name)
def test_torch_chunk_on_cuda_equals_float64_loop(case: Case):
    inputs = as_leaves([x.cuda() for x in case.inputs(2, 300)], torch.float32)
    exact = as_leaves(inputs, torch.float64)
    outputs, state = case.run(inputs, backend="torch")
    expected, expected_state = case.run(exact, backend="naive")
    assert_close([*outputs, *state], [*expected, *expected_state], 1e-5)
    assert_close(gradients(outputs, inputs), gradients(expected, exact), 1e-4)
