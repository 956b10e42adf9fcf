"""Whether the Hugging Face Hub answers at all, asked once before files are fetched.

huggingface_hub tries every file that the cache lacks for half a minute. Reading goes through `cache_if_unreachable`
instead, which then takes what the cache holds at once; pushing does not, and keeps all attempts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import get_session

logger = logging.getLogger(__name__)

SECONDS = 10
"""After which the hub counts as silent; huggingface_hub's own limit for asking about a file."""
_reason: str | None = None
"""Why the hub does not answer, in the context that found out."""


@contextmanager
def cache_if_unreachable() -> Iterator[str | None]:
    """A context in which nobody is asked where the hub does not answer: everything comes from the local cache.

    Yields:
        Why the hub cannot be reached, None where it can or is not to be asked (`HF_HUB_OFFLINE`).
    """
    global _reason
    if _reason is not None or constants.HF_HUB_OFFLINE or (reason := silence()) is None:
        yield _reason
        return
    logger.warning("the hub at %s does not answer (%s); looking in the local cache", endpoint(), reason)
    _reason, constants.HF_HUB_OFFLINE = reason, True  # the second is read at every call, also by transformers
    try:
        yield reason
    finally:
        _reason, constants.HF_HUB_OFFLINE = None, False


def silence() -> str | None:
    """Why the hub does not answer, None if it does, whatever it says."""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # a filter: what is not about the network is re-raised as it came
        if not is_network(error):
            raise
        return " ".join(str(error).split()) or type(error).__name__
    return None


def is_network(error: BaseException) -> bool:
    """Whether an exception says that a connection failed or broke."""
    # huggingface_hub speaks through httpx or httpx2, as its version has it, so the name is all that is common.
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx")


def endpoint() -> str:
    """The hub's address, without a password that is in it."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
