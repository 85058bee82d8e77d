"""Files are whole or as they were before."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from transfertransfo.files import (
    TEMPORARY,
    check_writable,
    own_prefix,
    remove_abandoned,
    remove_leftovers,
    write_atomically,
)


def test_write_atomically_replaces_and_keeps_the_usual_rights(tmp_path):
    path = tmp_path / "file"
    for content in ("first", b"second"):
        write_atomically(path, content)
    (tmp_path / "other").touch()
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_an_existing_file_keeps_its_rights_and_a_link_stays_one(tmp_path):
    """A private file became one that all could read, and a link a second file beside the one it led to."""
    (tmp_path / "there").mkdir()
    path, link = tmp_path / "there" / "private", tmp_path / "link"
    path.touch(0o600)
    link.symlink_to(path)
    write_atomically(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "there") == ["private"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """As `--report /dev/null`: root's next program found a file in the place of the device."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(path, "figures")
    assert os.read(reader, 99) == b"figures" and path.is_fifo()
    os.close(reader)
    check_writable(path)
    assert os.listdir(tmp_path) == ["pipe"]


def test_standard_output_keeps_what_was_printed(tmp_path):
    code = """
from pathlib import Path
from transfertransfo.files import write_atomically
print("printed", flush=True)
write_atomically(Path("/proc/self/fd/1"), "written")  # /dev/stdout, which a fault here would replace
"""
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "printed\nwritten"


def test_where_no_file_can_be_made_is_known_before(tmp_path):
    check_writable(tmp_path / "file")
    for path in (tmp_path, tmp_path / "nowhere" / "file", Path("/proc/file")):
        with pytest.raises(OSError):
            check_writable(path)
    assert os.listdir(tmp_path) == []


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


def test_what_a_killed_process_was_writing_is_removed_at_the_next_start(tmp_path):
    """It stayed beside the dataset's cache for ever."""
    code = f"""
import os, signal, tempfile
from pathlib import Path
from transfertransfo.files import TEMPORARY, open_atomically, own_prefix
tempfile.mkdtemp(prefix=own_prefix("cache_2"), suffix=TEMPORARY, dir={str(tmp_path)!r})
with open_atomically(Path({str(tmp_path)!r}, "cache_1.bin")) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 2 and all(name.endswith(TEMPORARY) for name in left)
    own = f"{own_prefix('cache_3')}abc{TEMPORARY}"  # this process lives
    other_machine = re.sub(r"-[0-9a-f]{8}[.]", "-00000000.", left[0])
    kept = {own, other_machine, f"cache_x{TEMPORARY}", "cache_1.bin"}
    for name in kept:
        (tmp_path / name).touch()
    remove_abandoned(tmp_path, "other_")
    assert set(os.listdir(tmp_path)) == {*kept, *left}
    remove_abandoned(tmp_path, "cache_")
    assert set(os.listdir(tmp_path)) == kept


def test_leftovers_are_known_by_their_names(tmp_path):
    """`--resume` removed whatever ended in .tmp, the user's own files and folders too."""
    for name in ("notes.tmp", "checkpoint_4_mine.tmp", "checkpoint_4.tmp", f"{own_prefix('file')}abc{TEMPORARY}"):
        (tmp_path / name).touch()
    (tmp_path / "mine.tmp").mkdir()
    remove_leftovers(tmp_path, r"checkpoint_\d+")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_4_mine.tmp", "mine.tmp", "notes.tmp"]
