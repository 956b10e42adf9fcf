"""The model type `linearize` of the lm-evaluation-harness, which loads as `linearize.load` does.

`lm_eval_tasks` gives it a model in memory. The harness has no plugins, so its command line finds the type through this
module: `python -m linearize.evals.lm_eval_model --model linearize --model_args pretrained=DIR --tasks piqa` is the
harness's own `lm_eval` with one more model type; from Python an import of this module registers it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from linearize.errors import UserError
from linearize.evals.text import evaluating
from linearize.hf.auto import register
from linearize.hf.load import load
from linearize.model_names import resolve_model
from linearize.progress import on_a_terminal

LOGIT_COPIES = 3
"""Float32 copies of a batch's logits that the harness holds at once, at most."""
MOST_TOKENS = {"cpu": 2048}
"""Padded tokens of an automatic batch by device: a CPU is as fast with few, and cannot recover when memory is out."""
MOST_TOKENS_ELSEWHERE = 2**17
LOADING = ("parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder")


@register_model("linearize")
class LinearizeLM(HFLM):
    """`HFLM` for what `linearize.load` loads, by folder, hub name, alias, or in memory.

    Args:
        pretrained: a checkpoint or alias, or a model in memory, which then needs `tokenizer`.
        batch_size: rows per forward, or "auto": as many tokens as memory holds, so that batches of short rows are
            larger; halved whenever a batch does not fit.
        max_batch_size: most rows of an automatic batch.
        device: default: a GPU if there is one.
        softmax_dtype: type of the log-probabilities. In bfloat16, which `HFLM` takes from the weights, sums of them are
            so coarse that options tie, and a tie counts for the first one.
        options: further options of `HFLM`, such as dtype, max_length or trust_remote_code.

    Raises:
        UserError: for options of `HFLM` that load in another way, and what `linearize.load` raises.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        softmax_dtype: str = "float32",
        **options: Any,
    ):
        refused = [name for name in LOADING if options.get(name)]
        if refused:
            raise UserError(
                f"--model linearize does not take {', '.join(refused)}; use --model hf with trust_remote_code=True, "
                "which reads the same checkpoint"
            )
        register()
        if isinstance(pretrained, str):
            pretrained = resolve_model(pretrained)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options |= {"backend": "causal", "softmax_dtype": softmax_dtype, "device": device}
        super().__init__(pretrained, batch_size=batch_size, **options)
        if self.tokenizer is not None and self.prefix_token_id is None:
            raise UserError(
                "tasks need a token that begins or ends texts, and the tokenizer has neither bos_token nor eos_token; "
                "set one in tokenizer_config.json, or leave tasks out"
            )
        self.max_batch_size = max_batch_size
        self.tokens = _most_tokens(self.model) if self.batch_size == "auto" else 0
        self._longest: int | None = None
        self._requests = 0
        self._batch = (0, 0)  # first row and size of the batch being gathered
        self._tried = (0, 0)  # rows and length of the last automatic batch

    def _create_model(
        self,
        pretrained: str,
        revision: str | None = "main",
        dtype: Any = "auto",
        trust_remote_code: bool | None = False,
        **options: Any,
    ) -> None:
        self._model, _ = load(
            pretrained,
            dtype=dtype,
            device=self.device,
            trust_remote_code=bool(trust_remote_code),
            revision=None if revision == "main" else revision,
            attn_implementation=options.get("attn_implementation"),
        )

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the greedy one."""
        return self._until_it_fits(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows of `max_length`."""
        self._longest, self._requests = self._longest_of(requests), self.tokens  # one text can have many windows
        return self._until_it_fits(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, prompts padded on the left."""
        self._longest, self._requests = self._longest_of(requests), len(requests)
        return self._until_it_fits(super().generate_until, requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: list, *args: Any, **options: Any) -> list[tuple[float, bool]]:
        for texts, _, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                told = f", {texts[1][:40]!r}," if texts else ""
                raise UserError(
                    f"an answer of a task{told} has {len(answer):,} tokens, and 1 to {self.max_length:,} fit "
                    "this model; leave the question or the task out"
                )
        return super()._loglikelihood_tokens(requests, *args, **options)

    def _longest_of(self, requests: list) -> int:
        return min(self.max_length, max((len(self.tok_encode(r.args[0])) for r in requests), default=1))

    def _until_it_fits(self, run: Callable[..., list], requests: list, disable_tqdm: bool) -> list:
        """Run the requests, again with half the tokens of the batch that did not fit; the longest come first.

        Raises:
            UserError: when a batch of one row, or of the size that was asked for, does not fit.
        """
        while True:
            self._batch, self._tried = (0, 0), (0, 0)
            try:
                return run(requests, disable_tqdm=disable_tqdm or not on_a_terminal())
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Outside of `except` the error is gone, and with it the frames that hold the batch's tensors.
            clear_device_cache(garbage_collection=True)
            rows, length = self._tried
            if rows <= 1:
                raise UserError(self._too_large(length))
            self.tokens = rows * length // 2

    def _too_large(self, length: int) -> str:
        memory = f"what is left of the memory of {self.device}"
        if length == 0 and self.batch_size != 1:
            return f"{self.batch_size} rows of a task do not fit into {memory}; choose a smaller batch_size, or auto"
        row = f"one row of {length} tokens" if length else "one row of a task"
        return (
            f"{row} does not fit into {memory}; load the weights in bfloat16, give fewer examples in the prompts "
            "(num_fewshot), or take another device"
        )

    def _rows(self, length: int, most: int) -> int:
        """Rows of an automatic batch of that many tokens a row, of at most so many rows that there are."""
        rows = max(1, min(self.tokens // max(1, length), self.max_batch_size or most, most))
        self._tried = (rows, length)
        return rows

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """Of the harness's automatic batches of one size, for whole texts and for generation."""
        return self._rows(self._longest or self.max_length, self._requests)

    def _batch_scheduler(self, pos: int, requests: Sequence) -> int:
        """Rows of the batch that request number `pos`, in order of falling length, belongs to."""
        first, size = self._batch
        if not first <= pos < first + size:
            _, context, continuation = requests[pos]
            length = min(self.max_length, len(context) + len(continuation) - 1)
            self._batch = (pos, self._rows(length, len(requests) - pos))
        return self._batch[1]


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could avoid the error: what torch's allocators, CUDA itself and its libraries say."""
    said = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))
    )


def _most_tokens(model: Any) -> int:
    """Padded tokens whose logits fit into half of the memory that is free."""
    device = model.device
    clear_device_cache()  # what earlier measurements left in the allocator is free too
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    vocabulary = model.config.get_text_config().vocab_size
    fitting = free // 2 // (vocabulary * 4 * LOGIT_COPIES)
    return max(1, min(fitting, MOST_TOKENS.get(device.type, MOST_TOKENS_ELSEWHERE)))


def in_memory(model: Any, tokenizer: Any, batch_size: int | str) -> LinearizeLM:
    """The harness's view of a model that is loaded already; its weights and training mode stay as they are."""
    with evaluating(model):
        return LinearizeLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)  # it gets a padding token


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
