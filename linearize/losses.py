"""Losses as pure functions: each returns the sum over the items it counts, so that callers can average over a step."""

from __future__ import annotations

import math

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


def l2(student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Length of the error over the root of its size, summed over tokens (RADLADS, arXiv:2505.03005); as `mse`."""
    error = (student.float() - teacher.float()).flatten(2)
    return _kept(error.square().mean(-1).add(1e-12).sqrt(), keep).sum()


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


def next_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, summed.

    Args:
        logits: [N, vocabulary].
        targets: [N] token ids.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    temperature: float = 1.0,
    top_k: int | None = None,
    teacher_temperature: float = 1.0,
) -> torch.Tensor:
    """Divergence of two distributions over the vocabulary, summed over rows and times temperature squared.

    Args:
        student, teacher: logits [N, vocabulary].
        kind: forward, KL(teacher || student); reverse; or jensen_shannon, the mean of the KL from each to their mean.
        temperature: divides the logits; its square keeps the size of gradients (Hinton et al. 2015, section 2).
        top_k: the teacher's likeliest tokens; all others count as one outcome, whose probability is what is left.
        teacher_temperature: divides the teacher's logits, and its alone (temperature scaling, Guo et al. 2017,
            arXiv:1706.04599).
    """
    of_teacher = temperature * teacher_temperature
    if top_k is not None and top_k < teacher.shape[-1]:
        return coarse_divergence(student, *likeliest(teacher, top_k, of_teacher), kind, temperature)
    log_s, log_t = _log_softmax(student, temperature), _log_softmax(teacher, of_teacher)
    return _divergence(log_s, log_t, kind) * temperature**2


def coarse_divergence(
    student: torch.Tensor, log_t: torch.Tensor, tokens: torch.Tensor, kind: str, temperature: float = 1.0
) -> torch.Tensor:
    """As `divergence` with `top_k`, where the teacher is what `likeliest` said of it at this temperature.

    Args:
        student: logits [N, vocabulary].
        log_t: [N, k + 1].
        tokens: [N, k] int64.
    """
    log_s = coarse(_log_softmax(student, temperature), tokens)
    return _divergence(log_s, log_t, kind) * temperature**2


def likeliest(logits: torch.Tensor, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N, k + 1] of the k likeliest tokens and of all others as one, and those tokens [N, k].

    The last one does not follow from that of another temperature: it sums over tokens that are not there.
    """
    log_p = _log_softmax(logits, temperature)
    tokens = log_p.topk(k, dim=-1).indices
    return coarse(log_p, tokens), tokens


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities [N, vocabulary], float32; a temperature of 1 takes no copy of the logits."""
    wide = logits.float()
    return (wide if temperature == 1 else wide / temperature).log_softmax(-1)


def _divergence(log_s: torch.Tensor, log_t: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "forward":
        return _kl(log_t, log_s)
    if kind == "reverse":
        return _kl(log_s, log_t)
    mean = torch.logaddexp(log_s, log_t) - math.log(2)
    return 0.5 * (_kl(log_t, mean) + _kl(log_s, mean))


def preference(h: torch.Tensor, kind: str, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of preference pairs, summed: DPO's (arXiv:2305.18290, equation 7) or IPO's (arXiv:2310.12036, equation 17).

    Args:
        h: [N] log p / p_ref of the chosen reply, minus that of the rejected one.
        kind: sigmoid or ipo.
        beta: factor on h; for ipo 1 / (2 beta) is what h is pulled to.
        label_smoothing: weight, for sigmoid, of the loss with both replies exchanged.
    """
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square().sum()
    kept, exchanged = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return -((1 - label_smoothing) * kept + label_smoothing * exchanged).sum()


def coarse(log_p: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of chosen outcomes, and one more for all others.

    Args:
        log_p: [N, vocabulary].
        outcomes: [N, k] indices, different in each row; fewer than there are.

    Returns:
        [N, k + 1].
    """
    others = log_p.scatter(-1, outcomes, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, outcomes), others], dim=-1)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q), summed over rows."""
    return (log_p.exp() * (log_p - log_q)).sum()


def _kept(values: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return values if keep is None else values * keep
