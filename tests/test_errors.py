"""Messages for users: suggestions, a full disk, and places that cannot be written."""

import errno
from pathlib import Path

import pytest

from linearize.errors import UserError, check_target, did_you_mean, disk_full, local_path, write_whole


def test_did_you_mean_names_the_closest_and_lists_all():
    assert did_you_mean("gated_deltnet", ["lolcats", "gated_deltanet"]) == (
        "; did you mean 'gated_deltanet'? known: gated_deltanet, lolcats"
    )
    assert did_you_mean("LoLCATs", ["lolcats", "gla"]) == "; did you mean 'lolcats'? known: gla, lolcats"


def test_did_you_mean_without_a_close_name_or_any_name():
    assert did_you_mean("zzz", ["gla", "lolcats"]) == "; known: gla, lolcats"
    assert did_you_mean("zzz", []) == "; known: none"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full_names_folder_free_bytes_and_what_is_safe(tmp_path, error):
    folder = tmp_path / "not" / "yet"
    with (
        pytest.raises(UserError, match="bytes free") as caught,
        disk_full(folder, safe="step 400 is kept"),
    ):
        raise error
    assert str(folder) in str(caught.value) and "step 400 is kept" in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.skipif("not __import__('os').path.exists('/dev/full')", reason="needs /dev/full (Linux)")
def test_disk_full_on_a_device_that_is_always_full(tmp_path):
    with (
        pytest.raises(UserError, match="no space left"),
        disk_full(tmp_path),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x" * 10_000)


def test_disk_full_lets_other_errors_pass(tmp_path):
    original = PermissionError(errno.EACCES, "denied")
    with pytest.raises(PermissionError) as caught, disk_full(tmp_path):
        raise original
    assert caught.value is original


def test_disk_full_finds_the_cause_of_a_wrapped_error(tmp_path):
    with pytest.raises(UserError, match="no space left"), disk_full(tmp_path):
        raise RuntimeError("could not build") from OSError(errno.ENOSPC, "No space left on device")


def test_targets_are_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a folder"):
        check_target(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        check_target(tmp_path / "file" / "report.json")
    check_target(tmp_path / "new" / "report.json")
    for name in ("n" * 300, "n" * 250, "nul\0"):  # the second fits, and what is written first does not
        with pytest.raises(UserError, match="can be no path|cannot be written"):
            check_target(tmp_path / name)


@pytest.mark.parametrize("text", ["n" * 300, "~nobody-of-this-name/x"])
def test_what_can_be_no_path(text: str) -> None:
    with pytest.raises(UserError, match="can be no path: ") as caught:
        local_path(text)
    assert len(str(caught.value)) < 250


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "äöü")
    assert path.read_bytes() == "äöü".encode()

    def broken(self: Path, *args: object, **options: object) -> int:
        raise UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new")
    assert path.read_bytes() == "äöü".encode()
