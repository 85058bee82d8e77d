"""Files that at any instant are either whole or as they were before."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # ends the name of what is being written


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that at any instant it is either whole or as it was before.

    Raises:
        OSError: nothing was written.
    """
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes its place at `path` when the block ends well, and else is gone."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=TEMPORARY)
    try:
        with open(descriptor, "wb") as file:
            yield file
        move_into_place(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed was about to write in a folder."""
    for path in folder.glob(f"*{TEMPORARY}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def move_into_place(temporary: str | Path, path: Path) -> None:
    """Rename a finished temporary file, which is private, to a file that others may read as any other new one."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())  # else a machine that goes down may keep the new name without the content
    umask = os.umask(0)  # the only way to read it
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
