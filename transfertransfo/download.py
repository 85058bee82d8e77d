"""Files from the internet: fetched once into a cache folder, and archives extracted without trusting them."""

import hashlib
import http.client
import logging
import os
import re
import ssl
import stat
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, Self

import requests
import urllib3
from filelock import FileLock
from requests.structures import CaseInsensitiveDict
from tqdm import tqdm

from transfertransfo.errors import UserError
from transfertransfo.files import TEMPORARY, own_prefix, remove_abandoned

logger = logging.getLogger(__name__)

TRIES = 4
BACK_OFF = 0.5  # seconds before the second try; doubled before each further one
TIMEOUT = (5, 30)  # seconds to connect, seconds without a byte
CHUNK = 1 << 18  # bytes

MAX_UNPACKED = 8 * 10**9  # bytes; the largest model that is trained here, in float32, is below 4 GB
MAX_MEMBERS = 10_000
MAX_DEPTH = 32  # folders within folders
MAX_HEADER = 1 << 20  # bytes; tarfile reads a long name or a header extension into memory at one go

WAYS_OUT = (
    "give a local file or folder instead, or use the embedded example:"
    " --dataset_path example/personachat.json --model_checkpoint example/model"
)


# ---- fetch ----


def cache_folder() -> Path:
    """Where downloads live: $TRANSFERTRANSFO_CACHE, or transfertransfo in $XDG_CACHE_HOME or in ~/.cache.

    For a user without a home it is a folder of the system's temporary one.

    Raises:
        UserError: that last folder belongs to someone else, or others may write to it.
    """
    if folder := os.environ.get("TRANSFERTRANSFO_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "transfertransfo")
    try:
        return Path.home() / ".cache" / "transfertransfo"
    except RuntimeError:  # neither $HOME nor an entry in the user database, as in a container
        return _private_temporary_folder()


def _private_temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"transfertransfo-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(f"no cache folder ({error}); set TRANSFERTRANSFO_CACHE to a folder") from error
    # everyone may write to /tmp: another user can have put a folder or a link of this name there first
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise UserError(f"{folder}: not a private folder of this user; set TRANSFERTRANSFO_CACHE to another")
    return folder


def is_url(text: str) -> bool:
    """Whether `text` is an address that `fetch` takes."""
    return text.lower().startswith(("http://", "https://"))


def fetch(url: str) -> Path:
    """The URL's content as a local file: from the cache folder, or downloaded into it.

    Args:
        url: an http or https address; https is never left on the way.

    Raises:
        UserError: the download failed; names the URL, the reason and the ways out.
    """
    # in one line, and without a user's password: this goes to the log and into a file's name
    shown = re.sub(r"//[^/@]*@", "//", " ".join(url.split()))
    name = re.sub(r"[^\w.-]+", "_", re.split(r"[?#]", shown)[0].rstrip("/").split("/")[-1], flags=re.ASCII)
    path = cache_folder() / f"{_short_hash(url)}-{name[-80:]}"
    try:
        if not _is_cached(path, shown):  # asked before the lock, so that a read-only cache serves too
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not _is_cached(path, shown):  # another process may have fetched it meanwhile
                    _download(url, shown, path)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # requests' own errors are OSErrors
        raise UserError(f"cannot download {shown} ({_reason(error)}); {WAYS_OUT}") from error
    return path


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _is_cached(path: Path, shown: str) -> bool:
    if not path.is_file():
        return False
    logger.info("%s: using the copy in the cache, %s", shown, path)
    return True


def _download(url: str, shown: str, path: Path) -> None:
    """Download to a temporary folder beside `path`, and rename the file when it is whole."""
    logger.info("downloading %s", shown)
    with _part_folder(path.parent) as folder, requests.Session() as session:
        if url.lower().startswith("https:"):
            del session.adapters["http://"]  # a redirect to plain http then has no way to go
        session.headers["Accept-Encoding"] = "identity"  # lengths and ranges are then those of the file itself
        part = Path(folder, path.name)
        part.touch(mode=0o600)
        with part.open("wb") as file:
            _transfer_with_retries(session, url, shown, file)
        os.replace(part, path)


def _part_folder(parent: Path) -> tempfile.TemporaryDirectory:
    """A private folder for what is not whole yet. Those of processes that were killed are removed."""
    remove_abandoned(parent, "part.")
    return tempfile.TemporaryDirectory(prefix=own_prefix("part"), suffix=TEMPORARY, dir=parent)


class _StatusError(requests.RequestException):
    """The server answers, but not with the content."""

    def __init__(self, status: int):
        super().__init__(f"HTTP {status} {http.client.responses.get(status, '')}")
        self.status = status


def _transfer_with_retries(session: requests.Session, url: str, shown: str, file: BinaryIO) -> None:
    earlier: CaseInsensitiveDict[str] = CaseInsensitiveDict()
    for attempt in range(1, TRIES + 1):
        try:
            return _transfer(session, url, file, earlier)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if attempt == TRIES or not _may_pass(error):
                raise
            logger.warning("%s: %s; trying again", shown, _reason(error))
            time.sleep(BACK_OFF * 2 ** (attempt - 1))


def _transfer(session: requests.Session, url: str, file: BinaryIO, earlier: CaseInsensitiveDict[str]) -> None:
    """Write the content to `file`, or the part of it that is still missing there.

    `earlier` holds the headers of the response that `file` comes from: they name the version of which to ask the rest.
    """
    done = file.tell()
    version = earlier.get("ETag") or earlier.get("Last-Modified")
    rest = {"Range": f"bytes={done}-", "If-Range": version} if version else {}
    with session.get(url, headers=rest, stream=True, timeout=TIMEOUT) as response:
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if response.status_code != 200 and not resumed:
            raise _StatusError(response.status_code)
        if not resumed:  # the server takes no ranges, or has another version by now
            done = file.seek(0)
            file.truncate()
        earlier.clear()
        earlier.update(response.headers)
        length = int(response.headers.get("Content-Length", 0))
        with tqdm(total=done + length or None, initial=done, unit="B", unit_scale=True, disable=None) as progress:
            for chunk in response.raw.stream(CHUNK, decode_content=False):  # raises where Content-Length is not met
                file.write(chunk)
                progress.update(len(chunk))


def _may_pass(error: Exception) -> bool:
    """Whether another try may go better."""
    if isinstance(error, _StatusError):
        return error.status in (408, 429) or error.status >= 500
    if isinstance(error, requests.exceptions.SSLError | requests.ConnectTimeout):
        return False
    return isinstance(error, requests.ConnectionError | requests.Timeout | urllib3.exceptions.HTTPError)


def _reason(error: BaseException) -> str:
    """The innermost error in one line: requests wraps urllib3's errors, which wrap the system's."""
    if isinstance(error, requests.exceptions.InvalidSchema):
        return "it redirects to another scheme, which is refused"
    while inner := next((e for e in (error.__cause__, *error.args) if isinstance(e, BaseException)), None):
        error = inner
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not accepted: {error.verify_message}"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- extract ----


def extract(archive: Path, into: Path | None = None) -> Path:
    """The folder with the content of a tar archive (plain, gz, bz2, xz) or of a zip archive.

    It lies beside the archive, or in the folder `into`, is made once for each content, and appears only when it is
    whole. Within it, the one folder that holds a `config.json` is returned, else the only top folder, else all of it.

    Raises:
        UserError: not an archive, cut or damaged, too large, or with a member that is a link, a device or outside.
    """
    archive = Path(archive)
    try:
        status = archive.stat()
        name = f"{archive.name}-{_short_hash(f'{status.st_size} {status.st_mtime_ns}')}"
        folder = (into or archive.parent) / name
        if not folder.is_dir():
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            logger.info("extracting %s to %s", archive, folder)
            _extract_to(archive, folder)
    except UserError:
        raise
    except Exception as error:  # damage shows as any of a dozen errors of six modules, RuntimeError among them
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot extract {archive} ({_one_line(error)})") from error
        reason = _one_line(error).split(": -")[0]  # tarfile goes on with each format that it has tried
        raise UserError(
            f"{archive}: not a whole tar or zip archive ({reason}); if it was downloaded, delete it to"
            " have it downloaded again"
        ) from error
    return _content_folder(folder)


def _extract_to(archive: Path, folder: Path) -> None:
    with _part_folder(folder.parent) as temporary:
        content = Path(temporary, "content")
        content.mkdir(mode=0o700)
        with archive.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        (_extract_zip if is_zip else _extract_tar)(archive, content)
        try:
            content.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and its folder is as good
                raise


class _TarHeader(tarfile.TarInfo):
    """A tar header, checked before tarfile acts on it."""

    @classmethod
    def frombuf(cls, *args: Any) -> Self:
        header = super().frombuf(*args)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"{header.name!r} is a sparse file")
        if not header.isreg() and not 0 <= header.size <= MAX_HEADER:
            raise ValueError(f"{header.name!r} has a header of {header.size} bytes")
        return header


def _extract_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, tarinfo=_TarHeader) as tar:
        members = ((member.name, member.size, member.isreg() or member.isdir(), member) for member in tar)
        for member in _checked(archive, members):
            tar.extract(member, folder, filter="data")
        # The end mark is two blocks of zeros, of which tarfile has read one and would miss both without a word.
        # Reading on to the end of the file also makes gzip compare its checksum.
        if not tar.fileobj.read(1 << 20).startswith(bytes(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("its end is missing")


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = ((info.filename, info.file_size, _is_plain(info), info) for info in file.infolist())
        for info in _checked(archive, members):
            file.extract(info, folder)  # writes no more than `file_size` bytes, and compares the checksum


def _is_plain(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)  # Unix's file type; 0 where another system made the archive
    return kind in (0, stat.S_IFREG, stat.S_IFDIR)


def _checked(archive: Path, members: Iterable[tuple[str, int, bool, Any]]) -> Iterator[Any]:
    """Pass on an archive's members, given as (name, bytes, is a file or a folder, handle), as long as they are safe."""
    total = 0
    for count, (name, size, is_plain, member) in enumerate(members, 1):
        total += size
        path = PureWindowsPath(name)  # the stricter reading: it knows \ and C: beside /
        if path.anchor or ".." in path.parts:
            fault = "its name leads out of the folder"
        elif not is_plain:
            fault = "a link or a device"
        elif len(path.parts) > MAX_DEPTH:
            fault = f"more than {MAX_DEPTH} folders deep"
        elif size < 0:
            fault = "a negative size"
        elif total > MAX_UNPACKED:
            fault = f"the content is larger than {MAX_UNPACKED:,} bytes"
        elif count > MAX_MEMBERS:
            fault = f"more than {MAX_MEMBERS:,} members"
        else:
            yield member
            continue
        raise UserError(f"{archive}: {name[:200]!r} is refused: {fault}")


def _content_folder(folder: Path) -> Path:
    configured = [path.parent for path in folder.rglob("config.json") if path.is_file()]
    if len(configured) == 1:
        return configured[0]
    top = list(folder.iterdir())
    return top[0] if len(top) == 1 and top[0].is_dir() else folder
