"""Publishes a checkpoint on the Hugging Face Hub: `push("my-model", "USER/NAME")`.

All files arrive in one commit, after the large ones have been stored, so a repository never holds half a checkpoint; a
push that broke off goes on where it stopped, and one that changes little sends little. The token is huggingface_hub's
own business (HF_TOKEN, HF_TOKEN_PATH, `hf auth login`): it is neither an argument nor ever shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import UserError
from linearize.hub.contents import Contents, contents, is_weights, token_line
from linearize.hub.errors import explained
from linearize.hub.published import CARD, Published, publish

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

BRANCH_PART = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    adapter_only: bool = False,
    base: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], Any] = print,
) -> str:
    """Upload the checkpoint in `folder` to the model repository `repo`, which is made if it is not there.

    What is there already, by its SHA-256, is not sent again. Weights of an earlier push that this one does not have are
    deleted in the same commit; everything else in the repository stays.

    Args:
        folder: what `linearize convert` wrote.
        repo: `USER/NAME`.
        public: whether everyone may see it; a private repository becomes public by it, once the files are there, and
            without it nothing is pushed to a public one. A new one is private by default.
        revision: branch, made from main if it is not there. Default: main.
        message: of the commit.
        adapter_only: send only the LoRA of `folder/adapter`, in PEFT's format.
        base: with `adapter_only`, the repository of the converted checkpoint that the adapter belongs to.
        dry_run: tell what would be sent, and neither ask nor change anything anywhere.
        say: receives what is sent, how that differs from the files in the folder, and what stays at home.

    Returns:
        The address of the repository, or of the branch.

    Raises:
        UserError: for a name or folder that cannot be pushed, a token that is missing or may not write there, a
            repository that holds something else or is public unasked, and a connection that breaks.
    """
    from huggingface_hub import HfApi

    folder = Path(folder).expanduser()
    check_name(repo)
    if base is not None:
        check_name(base)
        if not adapter_only:
            raise UserError("base is the checkpoint that an adapter belongs to; it needs adapter_only")
    if revision is not None:
        _check_branch(revision)
    if message is not None and token_line(message.encode()) is not None:
        raise UserError("the message has a token of the hub in it, and everyone could read that; write another")
    token = None if dry_run else _token()
    found = contents(folder, adapter_only=adapter_only, secrets=[token] if token else [])
    owner = base if base or not adapter_only else ""
    published = publish(found, folder, repo, adapter_of=owner, read_source=not dry_run)
    say(_listing(published, found, repo, revision, public))
    if dry_run:
        return repo
    api = HfApi()
    reserve(repo, public=public, adapter_only=adapter_only, revision=revision)
    with explained(repo):
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = _there(api, repo, revision)
        _check_kind(api, repo, revision, there, adapter_only)
        _commit(api, repo, revision, message, _operations(published, there), there.keys() - found.files.keys())
        if public and api.model_info(repo).private:
            api.update_repo_settings(repo, private=False)
    return f"{api.endpoint}/{repo}" + ("" if revision is None else f"/tree/{revision}")


def reserve(repo: str, *, public: bool = False, adapter_only: bool = False, revision: str | None = None) -> None:
    """Make sure that `repo` is there and may be written to, before a long run whose result shall go there.

    Raises:
        UserError: for a bad name, a missing or wrong token, a repository that the token may not make or that holds
            something else, and a public one where that was not asked for.
    """
    from huggingface_hub import HfApi

    check_name(repo)
    _token()
    api = HfApi()
    with explained(repo):
        _check_writer(api.whoami(), repo)
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise UserError(
                f"{repo} is public, and so would be what is pushed to it; give --public (public=True) if everyone may "
                f"see it, make it private at {api.endpoint}/{repo}/settings, or choose another name"
            )
        if revision is None:
            _check_kind(api, repo, None, _there(api, repo, None), adapter_only)


def _check_writer(user: dict[str, Any], repo: str) -> None:
    """Refuse a token that cannot write to `repo`, as far as the hub tells what it is for."""
    writes = [organisation for organisation in user.get("orgs", []) if organisation.get("roleInOrg") != "read"]
    owners = [user["name"], *(organisation["name"] for organisation in writes)]
    if repo.partition("/")[0] not in owners:
        raise UserError(
            f"the token belongs to {user['name']}, who cannot write to {repo}; take a name below one of: "
            f"{', '.join(owners)}, or log in as its owner"
        )
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UserError(
            f"the token may only read, not write to {repo}; make one that may at https://huggingface.co/settings/tokens"
        )


def check_name(repo: str) -> None:
    """Raise a UserError for what cannot be the name of a repository with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1:
        raise UserError(f"{repo!r} is no name of a repository; give USER/NAME, with your user or organisation name")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {error}") from error


def _check_branch(revision: str) -> None:
    parts = revision.split("/")
    if any(not BRANCH_PART.fullmatch(part) or part.endswith(".lock") or ".." in part for part in parts):
        raise UserError(f"{revision!r} is no name of a branch; use letters, digits, -, _, . and /, such as trial-2")
    if parts[0] == "refs":
        raise UserError(
            f"{revision!r} is no branch, and pushes to pull requests are not made; give a name such as trial-2"
        )


def _token() -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or look with --dry-run")
    token = get_token()
    if token is None:
        raise UserError(
            "there is no token of the Hugging Face Hub here; run `hf auth login`, or set HF_TOKEN to one that may write"
        )
    if not (token.isascii() and token.isprintable()):
        raise UserError("the token of the hub has characters that no token has; see to HF_TOKEN, or `hf auth login`")
    return token


def _listing(published: Published, found: Contents, repo: str, revision: str | None, public: bool) -> str:
    sizes = {name: published.size(name) for name in published.files}
    width = max(map(len, sizes))
    branch = "" if revision is None else f", branch {revision}"
    lines = [
        f"{len(sizes)} files, {_bytes(sum(sizes.values()))}, to {repo} ({'public' if public else 'private'}){branch}"
    ]
    lines += [f"  {name:<{width}}  {_bytes(size):>10}" for name, size in sorted(sizes.items())]
    if found.left_out:
        lines.append(f"not sent: {', '.join(found.left_out)}")
    for name, changes in published.changes.items():
        lines += [f"{name} is published with these changes; the file here stays as it is:"]
        lines += [f"  {change}" for change in changes]
    if CARD not in published.files:
        lines.append(f"no {CARD}, so the repository gets no model card")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"


def _there(api: HfApi, repo: str, revision: str | None) -> dict[str, Any]:
    """Path -> what the hub says of it, for every file of the repository."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_kind(api: HfApi, repo: str, revision: str | None, there: dict[str, Any], adapter_only: bool) -> None:
    """Refuse to write over a model that is none of ours, and to mix an adapter with a whole checkpoint."""
    held = [path for path in there if path.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth"))]
    held += [path for path in ("config.json", "adapter_config.json") if path in there]
    if not held:
        return
    ours = "recipe.yaml" in there
    if not ours and "config.json" in there:
        path = api.hf_hub_download(repo, "config.json", revision=revision)
        ours = '"linearize"' in Path(path).read_text(encoding="utf-8")
    if not ours:
        raise UserError(f"{repo} holds a model that linearize did not write, such as {held[0]}; choose another name")
    if adapter_only == ("config.json" in there):
        holds, gives = ("an adapter alone", "a whole checkpoint")[:: -1 if adapter_only else 1]
        raise UserError(f"{repo} holds {holds}, and this is {gives}; push it to a repository of its own")


def _operations(published: Published, there: dict[str, Any]) -> list[CommitOperationAdd]:
    """What is to be sent: everything but large files that the hub has already, as their SHA-256 says."""
    from huggingface_hub import CommitOperationAdd

    operations = []
    for name, content in published.files.items():
        operation = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        large, mine = getattr(there.get(name), "lfs", None), operation.upload_info
        if large is None or (large.size, large.sha256) != (mine.size, mine.sha256.hex()):
            operations.append(operation)
    return operations


def _commit(
    api: HfApi,
    repo: str,
    revision: str | None,
    message: str | None,
    additions: list[CommitOperationAdd],
    others: set[str],
) -> None:
    from huggingface_hub import CommitOperationDelete

    stale = [CommitOperationDelete(path) for path in sorted(others) if is_weights(path)]
    if additions or stale:
        message = message or "Upload with linearize"
        api.create_commit(repo, [*additions, *stale], commit_message=message, revision=revision)
