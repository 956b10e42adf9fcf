"""Losses as pure functions: each returns the sum over the items it counts, so that callers can average over a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mse(student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Squared error, mean over features, summed over tokens (LoLCATs, arXiv:2410.10254, equation 5).

    Args:
        student, teacher: [B, T, ...features].
        keep: [B, T] bool of real tokens, None for all.
    """
    error = (student.float() - teacher.float()).square().flatten(2).mean(-1)
    return _kept(error, keep).sum()


def cosine(student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """One minus the cosine over the last dimension, mean over heads, summed over tokens; shapes as `mse`."""
    distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return _kept(distance.flatten(2).mean(-1) if distance.ndim > 2 else distance, keep).sum()


def weight_cross_entropy(student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of attention weights, mean over heads, summed over queries (Hedgehog, arXiv:2402.04347, eq. 8).

    Args:
        student, teacher: [B, H, T, T] rows that sum to one; the teacher's zeros are ignored.
        keep: [B, T] bool of real tokens, None for all.
    """
    entropy = -(teacher.float() * student.float().clamp_min(1e-9).log()).sum(-1)  # [B, H, T]
    return _kept(entropy.mean(1), keep).sum()


def next_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy, summed over the labels that are not -100.

    Args:
        logits: [B, T, vocabulary]; position t predicts the label at t + 1.
        labels: [B, T] token ids, or -100 where nothing is asked.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def _kept(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return values if keep is None else values * keep
