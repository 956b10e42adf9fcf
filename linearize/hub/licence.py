"""Licences and notices that lie beside a source model: they go along into the checkpoint, and its card names them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = re.compile(
    r"(licen[cs]es?|notices?|copying|copyright|(acceptable[-_ ])?use[-_ ]policy|terms([-_ ]of[-_ ]use)?)"
    r"([-_ ][\w.-]*?)?(\.(txt|md|rst|pdf|html))?",
    re.IGNORECASE,
)
LIMIT = 2**20
"""Bytes that such a file has at most."""


def is_licence(name: str) -> bool:
    """Whether a file of this name is a licence, a notice or terms of use."""
    return NAME.fullmatch(name) is not None


def licence_files(source: str | Path) -> dict[str, bytes]:
    """Licences and notices in the folder of a source model, by name; none for a model on the hub.

    A link that leads out of the folder is left behind, with a warning, unless it is one of the hub's cache.
    """
    folder, found = Path(source).expanduser(), {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not is_licence(path.name) or not path.is_file() or path.stat().st_size > LIMIT:
            continue
        if _leads_out(path, folder):
            logger.warning("%s is a link to a file elsewhere, so it does not go along into the checkpoint", path)
            continue
        found[path.name] = path.read_bytes()
    return found


def _leads_out(path: Path, folder: Path) -> bool:
    root, target = folder.resolve(), path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return not (target.is_relative_to(root) or target.is_relative_to(blobs))


def licence_metadata(told: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """What a local source's card says of its licence, as it stands beside the files that go along.

    A link stays if it leads to one of them. A source whose card names no licence, or `other` without a link, gets the
    first licence file as its link, and the name that this gives itself in its first line.

    Args:
        told: metadata of the source's card.
        files: its `licence_files`.
    """
    told, link = dict(told), told.get("license_link")
    if isinstance(link, str) and not link.startswith("http"):
        name = link.removeprefix("./")
        told["license_link"] = name
        if name not in files:  # it leads nowhere from here
            del told["license_link"]
    texts = [name for name in files if name.lower().startswith(("license", "licence", "copying"))]
    if texts and told.get("license", "other") == "other" and "license_link" not in told:
        title = told.get("license_name") or _title(files[texts[0]])
        told |= {"license": "other", "license_name": title, "license_link": texts[0]}
    return {key: value for key, value in told.items() if value is not None}


def _title(text: bytes) -> str | None:
    """`LLAMA 3 COMMUNITY LICENSE AGREEMENT` -> `llama-3-community-license-agreement`; None for what is no title."""
    first = next((line for line in text.decode("utf-8", errors="replace").splitlines() if line.strip()), "")
    slug = "-".join(re.findall(r"[a-z0-9.]+", first.lower()))
    return slug if 0 < len(slug) <= 80 else None
