"""`transformers.Trainer` trains converted models, with checkpointed activations and on packed documents as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import KEYS
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from linearize.swap import swapped

STEPS = 2
LENGTHS = (21, 2, 13, 30)

every_family = pytest.mark.parametrize("family", KEYS)
every_mixer = pytest.mark.parametrize("key", ["lolcats", "gdn"])
every_layout = pytest.mark.parametrize("layers", ["LLL", "LSL"])


def documents() -> list[dict[str, list[int]]]:
    """Four texts of different lengths, of ids that mean nothing special anywhere."""
    rows = (torch.randint(2, 93, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS)
    return [{"input_ids": row.tolist()} for row in rows]


class Gradients(TrainerCallback):
    """Copies of all gradients, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def train(model: Any, folder: Path, collator: Any, **options: Any) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of `STEPS` steps of two documents each."""
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    gradients = Gradients()
    trainer = Trainer(model, args, train_dataset=documents(), data_collator=collator, callbacks=[gradients])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], gradients.steps


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # its new name came after 5.17
@every_mixer
@every_layout
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_trains_with_and_without_checkpointed_activations(
    converted: Any, pico_tokenizer: Any, tmp_path: Path, family: str, key: str, layers: str
) -> None:
    collator = DataCollatorForLanguageModeling(pico_tokenizer, mlm=False)  # pads, so the layers get a mask
    results = {}
    for checkpointed in (False, True):
        model = converted(key, layers, family=family)
        mixers = [attn.mixer for attn in swapped(model).values()]
        before = [parameter.detach().clone() for mixer in mixers for parameter in mixer.parameters()]
        forwards: list[None] = []
        for mixer in mixers:
            mixer.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(None))
        results[checkpointed] = train(model, tmp_path, collator, gradient_checkpointing=checkpointed)
        assert len(forwards) == len(mixers) * STEPS * (2 if checkpointed else 1)
        after = (parameter for mixer in mixers for parameter in mixer.parameters())
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    (losses, gradients), (losses_again, gradients_again) = results.values()
    assert len(losses) == STEPS and torch.tensor(losses).isfinite().all()
    assert losses_again == pytest.approx(losses)
    assert len(gradients) == STEPS and gradients[0].keys() == dict(model.named_parameters()).keys()
    for found, expected in zip(gradients_again, gradients, strict=True):
        torch.testing.assert_close(found, expected)


@every_family
@every_mixer
@every_layout
@torch.no_grad()
def test_packed_documents_have_the_losses_they_have_alone(converted: Any, family: str, key: str, layers: str) -> None:
    model = converted(key, layers, family=family)
    packed = DataCollatorWithFlattening()(documents())
    assert packed["input_ids"].shape == (1, sum(LENGTHS)) and "attention_mask" not in packed
    positions = packed["position_ids"]
    if family == "qwen2_5_vl":  # its softmax layers, also the source's, read documents from a row for the text alone
        positions = positions.expand(4, 1, -1)
    logits = model(packed["input_ids"], position_ids=positions, use_cache=False).logits[0]
    for row, found in zip(documents(), logits.split(LENGTHS), strict=True):
        ids = torch.tensor([row["input_ids"]])
        alone = model(ids, labels=ids).loss
        # 2e-5: a norm of very little makes much of its rounding; in float64, which experts have not, they are equal.
        torch.testing.assert_close(torch.nn.functional.cross_entropy(found[:-1], ids[0, 1:]), alone, rtol=2e-5, atol=0)


@every_mixer
@every_layout
def test_trainer_packs_documents(converted: Any, tmp_path: Path, key: str, layers: str) -> None:
    """Its first loss is the mean over the tokens of two documents, each of which sees itself alone."""
    model = converted(key, layers)
    sums = []
    with torch.no_grad():
        for row in documents():
            ids = torch.tensor([row["input_ids"]])
            sums.append(model(ids, labels=ids).loss * (ids.shape[1] - 1))
    losses, _ = train(model, tmp_path, DataCollatorWithFlattening(), train_sampling_strategy="sequential")
    assert losses[0] == pytest.approx(float(sum(sums[:2])) / (sum(LENGTHS[:2]) - 2), rel=1e-5)
