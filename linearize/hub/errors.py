"""Turns what the hub refuses, and connections that break, into `UserError`s that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from linearize.errors import UserError
from linearize.hub.online import endpoint, is_network

KEPT = "the files that arrived are kept there, so run the same command again"


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """A context whose errors of the hub and the network are `UserError`s about the repository; all else passes."""
    try:
        yield
    except Exception as error:  # a filter: what is not about the hub or the network is re-raised as it came
        reason = _reason(error, repo)
        if isinstance(error, UserError) or reason is None:
            raise
        raise UserError(reason) from error


def _reason(error: BaseException, repo: str) -> str | None:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _refusal(error.response.status_code, error.server_message, repo)
    if isinstance(error, HFValidationError):
        return f"the hub takes no such name: {error}"
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        return f"the hub does not accept the metadata of README.md: {' '.join(str(error).split())}"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"what answers at {endpoint()} is not the hub, or is broken: it sends no JSON. A proxy or the login page "
            "of a network may stand in between; log in there, or see to HF_ENDPOINT and HTTPS_PROXY, and run the same "
            "command again"
        )
    if is_network(error):
        told = " ".join(str(error).split())
        return f"the connection to the hub failed ({type(error).__name__}{told and f': {told}'}); {KEPT}"
    return _reason(error.__cause__, repo) if error.__cause__ is not None else None


def _refusal(status: int, message: str | None, repo: str) -> str:
    """What a status of the hub means for a push to `repo`."""
    told = message or f"status {status}"
    known = {
        401: f"the hub does not know the token ({told}); run `hf auth login`, or set HF_TOKEN to a valid one",
        402: f"the hub asks for payment ({told}); see to the storage of {repo}'s owner",
        403: f"the token may not write to {repo} ({told}); take one with write access, or another name",
        404: f"the hub does not find {repo} ({told}); check the name, and that the token may see it",
        409: f"somebody else changed {repo} at the same time ({told}); run the same command again",
        412: f"somebody else changed {repo} at the same time ({told}); run the same command again",
        429: f"the hub was asked too often ({told}); wait some minutes: {KEPT}",
    }
    if status >= 500:
        return f"the hub has a failure of its own ({told}, status {status}); wait some minutes: {KEPT}"
    return known.get(status, f"the hub refuses {repo}: {told} (status {status})")
