"""Sequence operators: each recurrence (`linear`, `simple_gla`, `gla`) and the sliding window, in torch.

A recurrence file holds `naive` (the truth, token by token), `chunk` (parallel), `step` (decoding) and one
public function of the same name as the file's operator that chooses between them. All tensors are `[B, T, H,
D]`.
"""
