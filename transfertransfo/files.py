"""Files that at any instant are either whole or as they were before."""

import contextlib
import errno
import glob
import os
import re
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # ends the name of what is being written
OWN = r"\.(\d{1,9})-([0-9a-f]{8})\.\w+"  # stands before that in names of `own_prefix`: the process and its machine


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that at any instant it is either whole or as it was before.

    Raises:
        OSError: nothing was written.
    """
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes its place at `path` when the block ends well, and else is gone.

    A link stays one: the file that it leads to is replaced. A device or a pipe is written to as it is.
    """
    if is_stream(path):
        with open(path, "ab") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=own_prefix(path.name), suffix=TEMPORARY)
    try:
        with open(descriptor, "wb") as file:
            yield file
        move_into_place(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def is_stream(path: str | Path) -> bool:
    """Whether something is there that no file may take the place of: a device, a pipe, standard output."""
    if str(path).startswith(("/dev/std", "/dev/fd/", "/proc/self/fd/")):
        return True  # where it leads to a file too: what has been printed there stays
    return os.path.exists(path) and not os.path.isfile(path)


def check_writable(path: str | Path) -> None:
    """Make a file where `open_atomically` would make one, and remove it.

    Raises:
        OSError: none can be made there.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not is_stream(path):
        tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what a process that was killed was about to write in a folder, in which no other process may be writing.

    Args:
        names: patterns of what is there beside the files and folders of `own_prefix`, without `TEMPORARY`.
    """
    pattern = "|".join([f".*{OWN}", *names])
    for path in folder.glob(f"*{TEMPORARY}"):
        if re.fullmatch(f"({pattern}){re.escape(TEMPORARY)}", path.name):  # others are the user's own
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def own_prefix(name: str) -> str:
    """The beginning of the name of a temporary file or folder of this process, for `remove_abandoned`."""
    return f"{name}.{os.getpid()}-{_machine()}."


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the temporary files and folders whose names begin so and whose process, on this machine, is no more.

    They are those of `own_prefix`. What cannot be removed stays.
    """
    for path in folder.glob(f"{glob.escape(name)}*{TEMPORARY}"):
        found = re.search(OWN + re.escape(TEMPORARY) + "$", path.name)
        if found and found[2] == _machine() and not _is_alive(int(found[1])):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _machine() -> str:
    """Tells this machine from others that write to the same disk; a container counts as one."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def move_into_place(temporary: str | Path, path: Path) -> None:
    """Rename a finished temporary file, which is private, to one with the rights of a new file, or of the old one."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())  # else a machine that goes down may keep the new name without the content
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        umask = os.umask(0)  # the only way to read it
        os.umask(umask)
        mode = 0o666 & ~umask
    os.chmod(temporary, mode)
    os.replace(temporary, path)
