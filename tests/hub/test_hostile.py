"""A hub that refuses, fails or lies, from inside one process: what `push` says, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import Hub

from linearize.errors import UserError
from linearize.hub.push import push, reserve


def refused(folder: Path, repo: str = "ada/student", *, public: bool = False) -> str:
    with pytest.raises(UserError) as told:
        push(folder, repo, public=public, say=lambda text: None)
    return str(told.value)


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "whoami", 500, "the hub has a failure of its own"),
        ("POST", "repos/create", 403, "the token may not write to ada/student"),
        ("POST", "/preupload/", 401, "the hub does not know the token"),
        ("POST", "objects/batch", 402, "the hub asks for payment"),
        ("PUT", "/blobs/", 500, "the hub has a failure of its own"),
        ("POST", "/commit/", 409, "somebody else changed ada/student"),
        ("POST", "/commit/", 412, "somebody else changed ada/student"),
        ("POST", "/commit/", 429, "the hub was asked too often"),
        ("POST", "/commit/", 503, "run the same command again"),
        ("POST", "/commit/", 418, "the hub refuses ada/student: refused with 418 (status 418)"),
    ],
)
def test_a_refusal_is_explained_and_the_next_push_succeeds(
    here: Hub, folder: Path, method: str, path: str, status: int, told: str
) -> None:
    here.refuse = lambda asked, where: status if asked == method and path in where else None
    assert told in refused(folder)
    assert not any(repo.branches["main"] for repo in here.repos.values()), "no half a checkpoint"
    here.refuse = lambda asked, where: None
    push(folder, "ada/student", say=lambda text: None)
    assert len(here.uploads) == len(set(here.uploads)) and here.repos["ada/student"].private


def test_answers_that_are_no_json(here: Hub, folder: Path) -> None:
    here.garbled = True
    said = refused(folder)
    assert "it sends no JSON" in said and "HTTPS_PROXY" in said


def test_tokens_and_members_that_may_only_read(here: Hub, folder: Path) -> None:
    here.members = "read"
    assert "who cannot write to lab/student; take a name below one of: ada," in refused(folder, "lab/student")
    here.role = "read"
    assert "the token may only read, not write to ada/student" in refused(folder)
    assert not here.repos


def test_nothing_becomes_public_by_accident(here: Hub, folder: Path) -> None:
    here.add("ada/open", {})
    assert "ada/open is public, and so would be what is pushed to it" in refused(folder, "ada/open")
    with pytest.raises(UserError, match="is public"):
        reserve("ada/open")
    here.add("ada/hidden", {}, private=True)
    here.refuse = lambda method, path: 500 if "/commit/" in path else None
    refused(folder, "ada/hidden", public=True)
    assert here.repos["ada/hidden"].private, "a push that failed makes nothing public"
    here.refuse = lambda method, path: None
    push(folder, "ada/hidden", public=True, say=lambda text: None)
    assert not here.repos["ada/hidden"].private


def test_what_a_repository_holds_is_known_before_a_long_run(here: Hub) -> None:
    here.add("ada/bert", {"config.json": b"{}", "model.safetensors": b"theirs"}, private=True)
    with pytest.raises(UserError, match="holds a model that linearize did not write"):
        reserve("ada/bert")
    reserve("ada/new")
    assert here.repos["ada/new"].private
