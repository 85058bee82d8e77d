"""Files are whole or as they were before."""

import os

import pytest

from transfertransfo.files import write_atomically


def test_write_atomically_replaces_and_keeps_the_usual_rights(tmp_path):
    path = tmp_path / "file"
    for content in ("first", b"second"):
        write_atomically(path, content)
    (tmp_path / "other").touch()
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


@pytest.mark.parametrize("function", ["os.chmod", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error

    monkeypatch.setattr(f"transfertransfo.files.{function}", fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
