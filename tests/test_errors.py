"""Messages for users: suggestions, and a full disk."""

import errno

import pytest

from linearize.errors import UserError, did_you_mean, disk_full


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
