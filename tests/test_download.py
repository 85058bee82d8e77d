"""Downloads from a server on 127.0.0.1 that misbehaves on order, and archives that try to get out."""

import bz2
import gzip
import io
import lzma
import os
import pwd
import ssl
import stat
import struct
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from filelock import FileLock

from transfertransfo import download
from transfertransfo.download import cache_folder, extract, fetch, is_url
from transfertransfo.errors import UserError

CONTENT = bytes(range(256)) * 4000  # about 1 MB, so that a cut comes after several chunks
WAYS_OUT = (
    "; give a local file or folder instead, or use the embedded example:"
    " --dataset_path example/personachat.json --model_checkpoint example/model"
)

# A key and its self-signed certificate for 127.0.0.1, made for these tests and used nowhere else.
TLS = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgg1hZagPKqKZddH1P
x2+p5I0P1ktxosLKn36whreRSAKhRANCAATdiRPAWfuLy6IUxNhcsLfVXiWdh7Rq
TUlb7W1J4O4q/Q+GG7CJ1iSvijknO8p2JQmNPF51ZJ2pQOcGZMVNM7KH
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBjjCCATOgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4w
LjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABN2JE8BZ+4vLohTE
2Fywt9VeJZ2HtGpNSVvtbUng7ir9D4YbsInWJK+KOSc7ynYlCY08XnVknalA5wZk
xU0zsoejdDByMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0GA1Ud
DgQWBBRL1fWuR//2iWA65sAX3ok387AM4DAfBgNVHSMEGDAWgBRL1fWuR//2iWA6
5sAX3ok387AM4DAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0kAMEYCIQCS
w6U76x33KG7XtmAsKaNfIP4NiZFrQKVgexyQtwNzMwIhAOq88x5dceYNBIT0yn6K
785WzsGFEDEOvXozibqYiKzB
-----END CERTIFICATE-----
"""


# ---- the server ----


@dataclass
class Answer:
    """What the server does with one request."""

    status: int = 200
    body: bytes = CONTENT
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body after which the connection is closed
    ranges: bool = False  # whether a range that is asked for is given
    meanwhile: Callable[[], object] = lambda: None  # called after the first half of the body


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        server.seen.append(dict(self.headers))
        start, status = 0, answer.status
        asked_version = self.headers.get("If-Range")
        if answer.ranges and "Range" in self.headers and asked_version == answer.headers.get("ETag"):
            start, status = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
        body = answer.body[start:]
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | answer.headers
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        sent = body[: answer.cut]
        self.wfile.write(sent[: len(sent) // 2])
        self.wfile.flush()
        answer.meanwhile()
        self.wfile.write(sent[len(sent) // 2 :])

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """Gives `answers` in turn, the last one again and again; `seen` holds the headers of each request."""

    daemon_threads = True

    def __init__(self, certificate=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen = [Answer()], []
        self.root = f"http{'s' if certificate else ''}://127.0.0.1:{self.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_):  # a client that hangs up is part of the tests
        pass


def serve(certificate=None):
    with Server(certificate) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.001}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server():
    yield from serve()


@pytest.fixture
def certificate(tmp_path):
    (tmp_path / "tls.pem").write_text(TLS)
    return tmp_path / "tls.pem"


@pytest.fixture
def tls_server(certificate):
    yield from serve(certificate)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "BACK_OFF", 0)
    monkeypatch.setenv("TRANSFERTRANSFO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def refusal(function, *arguments) -> str:
    """The one line with which the call is refused."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def left_in(cache) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


# ---- the cache folder ----


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TRANSFERTRANSFO_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "transfertransfo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "transfertransfo"


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without a home; returns the folder that is then the cache."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("TRANSFERTRANSFO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"transfertransfo-{os.getuid()}"


def test_without_a_home_the_cache_is_a_private_temporary_folder(homeless, server):
    assert cache_folder() == homeless
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    assert fetch(server.root + "/data.json").parent == homeless


def test_a_temporary_cache_that_others_prepared_is_refused(homeless, tmp_path):
    homeless.mkdir()
    homeless.chmod(0o777)
    assert "not a private folder" in refusal(cache_folder)
    homeless.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    homeless.symlink_to(tmp_path / "elsewhere")
    assert "not a private folder" in refusal(cache_folder)
    homeless.unlink()
    homeless.write_text("")
    assert "TRANSFERTRANSFO_CACHE" in refusal(cache_folder)


# ---- downloads that work ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://host/a", True),
        ("HTTPS://host", True),
        ("ftp://host/a", False),
        ("file:///a", False),
        ("data/http.json", False),
        ("https:/a", False),
        ("", False),
    ],
)
def test_is_url(text, expected):
    assert is_url(text) is expected


def test_a_file_is_fetched_once(server, cache, caplog):
    caplog.set_level("INFO")
    path = fetch(server.root + "/folder/data.json?version=1#top")
    assert path.read_bytes() == CONTENT
    assert path.parent == cache and path.name.endswith("-data.json") and left_in(cache) == [path.name]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "using the copy" not in caplog.text
    assert fetch(server.root + "/folder/data.json?version=1#top") == path
    assert len(server.seen) == 1 and "using the copy" in caplog.messages[-1]


def test_urls_with_one_ending_have_their_own_files(server):
    server.answers = [Answer(body=b"one"), Answer(body=b"two"), Answer(body=b"three")]
    paths = [fetch(server.root + end) for end in ("/a/data.json", "/b/data.json", "/a/data.json?c")]
    assert [path.read_bytes() for path in paths] == [b"one", b"two", b"three"]


@pytest.mark.parametrize(
    "end", ["", "/", "/..", "/a/../..", "/%2e%2e%2f", "/" + "long" * 200, "/\n\0\u00e9", "/\\..\\x"]
)
def test_the_name_of_a_file_stays_in_the_cache_folder(server, cache, end):
    path = fetch(server.root + end)
    assert path.parent == cache and len(path.name) < 100 and path.name.isascii() and path.name.isprintable()


def test_a_password_in_the_url_is_not_shown(server, cache, caplog):
    caplog.set_level("INFO")
    path = fetch(server.root.replace("//", "//me:secret@"))
    assert server.seen[0]["Authorization"].startswith("Basic")
    server.answers = [Answer(status=404)]
    message = refusal(fetch, server.root.replace("//", "//me:secret@") + "/x")
    assert "secret" not in path.name + caplog.text + message


def test_nothing_is_seen_of_a_file_before_it_is_whole(server, cache):
    seen = {}

    def look():
        for path in cache.iterdir():
            seen[path.name] = stat.S_IMODE(path.stat().st_mode)

    server.answers = [Answer(meanwhile=look)]
    path = fetch(server.root + "/data.json")
    assert path.name not in seen
    assert [mode for name, mode in seen.items() if name.startswith("part.")] == [0o700]
    assert left_in(cache) == [path.name]


def test_compressed_files_arrive_as_they_are(server):
    """A server that labels a .gz file as an encoding of the text had it unpacked under the name of the packed one."""
    packed = gzip.compress(CONTENT)
    server.answers = [Answer(body=packed, headers={"Content-Encoding": "gzip"})]
    assert fetch(server.root + "/data.json.gz").read_bytes() == packed
    assert server.seen[0]["Accept-Encoding"] == "identity"


def test_the_progress_bar_is_for_terminals_only(server, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    fetch(server.root + "/a")
    assert screen.getvalue() == ""
    screen.isatty = lambda: True
    fetch(server.root + "/b")
    assert "1.02M/1.02M" in screen.getvalue()


def test_two_at_once_do_one_download(server):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server.root + "/data.json"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8 and len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert len(server.seen) == 1


def test_a_file_that_another_process_has_fetched_meanwhile_is_used(server, monkeypatch):
    """Waiting for the lock and then downloading all the same would replace a file that the other already reads."""

    class SlowLock(FileLock):
        def acquire(self, *arguments, **options):
            path.write_bytes(CONTENT)  # the other process ends while this one waits
            return super().acquire(*arguments, **options)

    path = fetch(server.root + "/data.json")
    path.unlink()
    monkeypatch.setattr(download, "FileLock", SlowLock)
    assert fetch(server.root + "/data.json") == path and len(server.seen) == 1


def test_a_read_only_cache_serves(server, monkeypatch):
    path = fetch(server.root + "/data.json")
    monkeypatch.setattr(download, "FileLock", None)
    monkeypatch.setattr("pathlib.Path.mkdir", None)
    assert fetch(server.root + "/data.json") == path


# ---- downloads that break ----


def test_a_cut_connection_is_resumed(server, caplog):
    half = len(CONTENT) // 2
    server.answers = [Answer(cut=half, headers={"ETag": '"1"'}), Answer(ranges=True, headers={"ETag": '"1"'})]
    assert fetch(server.root + "/data.json").read_bytes() == CONTENT
    assert server.seen[1]["Range"] == f"bytes={half}-" and server.seen[1]["If-Range"] == '"1"'
    assert "trying again" in caplog.text


def test_a_download_is_resumed_more_than_once(server):
    version = {"ETag": '"1"'}
    third = len(CONTENT) // 3
    server.answers = [
        Answer(cut=third, headers=version),
        Answer(cut=third, ranges=True, headers=version),
        Answer(ranges=True, headers=version),
    ]
    assert fetch(server.root + "/data.json").read_bytes() == CONTENT
    assert server.seen[2]["Range"] == f"bytes={2 * third}-"


@pytest.mark.parametrize("first", [{}, {"ETag": '"1"'}, {"Last-Modified": "Thu, 01 Jan 2020 00:00:00 GMT"}])
def test_a_cut_connection_restarts_where_it_cannot_resume(server, first):
    """The rest of a newer version must not be added to the first half of the older one."""
    newer = CONTENT[1000::-1]
    server.answers = [
        Answer(cut=len(CONTENT) // 2, headers=first),
        Answer(body=newer, ranges=True, headers={"ETag": '"2"'}),
    ]
    assert fetch(server.root + "/data.json").read_bytes() == newer
    assert ("Range" in server.seen[1]) == bool(first)


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_restart_forgets_the_version_before(server, cut):
    """A version between, without a name and cut too, was completed by the rest of the first one."""
    first = Answer(cut=len(CONTENT) // 2, ranges=True, headers={"ETag": '"1"'})
    server.answers = [first, Answer(body=CONTENT[::-1], cut=cut), Answer(ranges=True, headers={"ETag": '"1"'})]
    assert fetch(server.root + "/data.json").read_bytes() == CONTENT
    assert "Range" not in server.seen[2]


def test_a_range_that_was_not_asked_for_is_refused(server, cache):
    server.answers = [
        Answer(cut=len(CONTENT) // 2, headers={"ETag": '"1"'}),
        Answer(status=206, headers={"Content-Range": "bytes 7-9/10"}),
    ]
    assert "HTTP 206" in refusal(fetch, server.root + "/data.json")
    assert left_in(cache) == []


def test_a_wrong_length_is_an_error(server, cache):
    server.answers = [Answer(headers={"Content-Length": str(len(CONTENT) + 10)})]
    message = refusal(fetch, server.root + "/data.json")
    assert f"{len(CONTENT)} bytes read, 10 more expected" in message and message.endswith(WAYS_OUT)
    assert len(server.seen) == download.TRIES and left_in(cache) == []


def test_a_length_that_is_no_number_is_an_error(server):
    server.answers = [Answer(headers={"Content-Length": "many"})]
    assert "many" in refusal(fetch, server.root + "/data.json")


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_passing_fault_is_tried_again(server, status):
    server.answers = [Answer(status=status), Answer()]
    assert fetch(server.root + "/data.json").read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "phrase"), [(404, "Not Found"), (403, "Forbidden"), (204, "No Content")])
def test_a_lasting_fault_fails_at_once(server, cache, status, phrase):
    server.answers = [Answer(status=status), Answer()]
    url = server.root + "/data.json"
    assert refusal(fetch, url) == f"cannot download {url} (HTTP {status} {phrase}){WAYS_OUT}"
    assert len(server.seen) == 1 and left_in(cache) == []


def test_a_fault_that_stays_ends_after_a_few_tries(server, monkeypatch):
    waits = []
    monkeypatch.setattr(download, "BACK_OFF", 1)
    monkeypatch.setattr("time.sleep", waits.append)
    server.answers = [Answer(status=500)]
    assert "(HTTP 500 Internal Server Error)" in refusal(fetch, server.root + "/data.json")
    assert waits == [1, 2, 4] and len(server.seen) == 4


def test_no_network_is_said_in_one_line(server, caplog):
    server.server_close()
    url = server.root + "/data.json"
    message = refusal(fetch, url)
    assert message.startswith(f"cannot download {url} (") and "Connection refused" in message
    assert message.endswith(WAYS_OUT)


def test_a_host_that_does_not_answer_is_not_tried_again(server, monkeypatch):
    """Four tries with their time-outs kept a user behind a closed firewall waiting."""
    tries = []

    def no_answer(self, *_, **__):
        tries.append(self)
        raise requests.ConnectTimeout("timed out")

    monkeypatch.setattr(requests.Session, "get", no_answer)
    assert "(timed out)" in refusal(fetch, server.root + "/data.json") and len(tries) == 1


def test_the_reason_is_the_downloads_own(server):
    """A download in an `except` block gave that block's error as its reason."""
    server.answers = [Answer(status=404)]
    try:
        raise FileNotFoundError("no such model")
    except FileNotFoundError:
        assert "404" in refusal(fetch, server.root + "/data.json")
        server.server_close()
        assert "no such model" not in refusal(fetch, server.root + "/data.json")


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[",
        "http://127.0.0.1:port/",
        "http://*/",
        "http://%/a",
        "http://127.0.0.1:99999/",
        "http://" + "a" * 64 + ".invalid/",
        "http://\ud800/",
        "http://*/\nline",
    ],
)
def test_a_url_that_is_none_is_said_in_one_line(url):
    assert refusal(fetch, url).startswith("cannot download http://")


def test_a_redirect_within_the_scheme_is_followed(server):
    server.answers = [Answer(status=302, body=b"", headers={"Location": "/other"}), Answer()]
    assert fetch(server.root + "/data.json").read_bytes() == CONTENT


def test_a_redirect_in_a_circle_ends(server):
    server.answers = [Answer(status=302, body=b"", headers={"Location": "/data.json"})]
    assert "redirects" in refusal(fetch, server.root + "/data.json")
    assert len(server.seen) == 31  # requests' own limit, once and not once a try


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:,a"])
def test_a_redirect_to_another_scheme_is_refused(server, cache, location):
    server.answers = [Answer(status=302, body=b"", headers={"Location": location})]
    assert "redirects to another scheme" in refusal(fetch, server.root + "/data.json")
    assert len(server.seen) == 1 and left_in(cache) == []


def test_https_is_fetched_and_never_left(server, tls_server, certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert fetch(tls_server.root + "/a").read_bytes() == CONTENT
    tls_server.answers = [Answer(status=302, body=b"", headers={"Location": server.root + "/b"})]
    assert "redirects to another scheme" in refusal(fetch, tls_server.root.replace("https", "HTTPS") + "/b")
    assert server.seen == []


def test_http_may_lead_to_https(server, tls_server, certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    server.answers = [Answer(status=302, body=b"", headers={"Location": tls_server.root + "/b"})]
    assert fetch(server.root + "/a").read_bytes() == CONTENT


def test_a_certificate_that_is_not_accepted_is_said(tls_server, caplog):
    message = refusal(fetch, tls_server.root + "/data.json")
    assert "(the server's certificate is not accepted: self" in message and message.endswith(WAYS_OUT)
    assert tls_server.seen == [] and "trying again" not in caplog.text


def test_a_cache_folder_that_cannot_be_used_is_said(server, cache):
    cache.write_text("a file where a folder should be")
    message = refusal(fetch, server.root + "/data.json")
    assert str(cache) in message and "File exists" in message and server.seen == []


def test_no_space_is_said_and_not_tried_again(server, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "tqdm", full)
    assert "No space left on device" in refusal(fetch, server.root + "/data.json")
    assert len(server.seen) == 1 and left_in(cache) == []


# ---- archives ----

CHECKPOINT = {"config.json": b"{}", "vocab/words.txt": b"hello\n"}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def member(name: str, kind: bytes = tarfile.REGTYPE, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def tar_bytes(files: dict[str, bytes], extra=(), **options) -> bytes:
    """A tar archive of files, followed by bare member headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in files.items():
            tar.addfile(member(name, size=len(content)), io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


def zip_bytes(files: dict[str, bytes], kind: int = 0) -> bytes:
    """A zip archive whose last member has the Unix file type `kind`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
        info.external_attr = kind << 16
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path):
    """Write an archive into a folder of its own, which `refused` then finds unchanged."""
    folder = tmp_path / "archives"
    folder.mkdir()

    def write(content: bytes, name: str = "model.tar.gz"):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def refused(archive) -> str:
    """The line with which an archive is refused, without a trace of its content anywhere near."""
    before = sorted(archive.parent.parent.rglob("*"))
    message = refusal(extract, archive)
    assert sorted(archive.parent.parent.rglob("*")) == before
    assert str(archive) in message
    return message


def content_of(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_tar_archive_is_extracted(write, compression):
    folder = extract(write(COMPRESS[compression](tar_bytes(CHECKPOINT)), "anything"))
    assert content_of(folder) == CHECKPOINT
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_names_that_start_with_a_dot_are_usual(write):
    content = tar_bytes({"./config.json": b"{}", "./.hidden": b""}, [member("./", tarfile.DIRTYPE, mode=0o755)])
    assert content_of(extract(write(content))) == {"config.json": b"{}", ".hidden": b""}


def test_a_zip_archive_is_extracted(write):
    assert content_of(extract(write(zip_bytes(CHECKPOINT)))) == CHECKPOINT


def test_a_tar_archive_that_ends_in_a_zip_archive_is_a_tar_archive(write):
    files = {"config.json": b"{}", "data.zip": zip_bytes({"a": b"a"})}
    assert content_of(extract(write(tar_bytes(files)))) == files


@pytest.mark.parametrize(
    ("files", "returned"),
    [
        (["config.json", "weights"], "."),
        (["model/config.json", "model/weights"], "model"),
        (["a/b/config.json", "a/readme", "notes"], "a/b"),
        (["model/config.json", "model/checkpoint/config.json"], "model"),
        (["a/config.json", "b/config.json"], "."),
        (["data/train.txt", "data/valid.txt"], "data"),
        (["train.txt", "valid.txt"], "."),
        (["train.txt"], "."),
    ],
)
def test_the_folder_returned(write, files, returned):
    archive = write(tar_bytes(dict.fromkeys(files, b"")))
    folder = extract(archive)
    whole = next(path for path in archive.parent.iterdir() if path.is_dir())
    assert folder == whole / returned


def test_an_archive_is_extracted_once_for_each_content(write, monkeypatch):
    """An archive replaced under its old name gave the old model."""
    archive = write(tar_bytes(CHECKPOINT))
    first = extract(archive)
    with monkeypatch.context() as context:
        context.setattr(download, "_extract_to", None)
        assert extract(archive) == first
    write(tar_bytes({"config.json": b"[]"}))
    assert content_of(extract(archive)) == {"config.json": b"[]"}


def test_another_process_may_be_first(write, monkeypatch):
    archive = write(tar_bytes(CHECKPOINT))
    unpack = download._extract_tar

    def unpack_late(*arguments):
        monkeypatch.setattr(download, "_extract_tar", unpack)
        extract(archive)
        unpack(*arguments)

    monkeypatch.setattr(download, "_extract_tar", unpack_late)
    assert content_of(extract(archive)) == CHECKPOINT
    assert len(list(archive.parent.iterdir())) == 2


def test_temporary_folders_are_private_and_go(write, monkeypatch):
    archive = write(tar_bytes(CHECKPOINT))

    def look(_, folder):
        assert stat.S_IMODE(folder.parent.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_extract_tar", look)
    assert "No space left on device" in refused(archive)


def test_modes_that_give_more_than_needed_are_dropped(write):
    folder = extract(write(tar_bytes({"config.json": b"{}"}, [member("run", mode=0o6777)])))
    assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o755


OUTSIDE = ["../evil", "a/../../evil", "/tmp/evil", "..", "..\\evil", "C:\\evil", "C:evil", "\\\\host\\evil"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_a_name_that_leads_outside_is_refused(write, make, name):
    message = refused(write(make({"config.json": b"{}", name: b"evil"})))
    assert f"{name!r} is refused: its name leads out" in message


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_long_form_name_that_leads_outside_is_refused(write, name):
    info = member("harmless", pax_headers={"path": name})
    assert "leads out" in refused(write(tar_bytes(CHECKPOINT, [info], format=tarfile.PAX_FORMAT)))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"?"]
)
@pytest.mark.parametrize("target", ["/etc", "..", "config.json"])
def test_links_and_devices_in_a_tar_archive_are_refused(write, kind, target):
    info = member("evil", kind, linkname=target)
    assert "'evil' is refused: a link or a device" in refused(write(tar_bytes(CHECKPOINT, [info])))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_archive_are_refused(write, kind):
    content = zip_bytes(CHECKPOINT | {"evil": b"/etc"}, kind)
    assert "'evil' is refused: a link or a device" in refused(write(content))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_bomb_is_refused_by_its_header(write, form):
    """Ten gigabytes of zeros, or what says it is: nothing of it is written."""
    zeros = member("zeros", size=10 * 10**9).tobuf(form) + bytes(100_000)
    message = refused(write(gzip.compress(zeros)))
    assert "'zeros' is refused: the content is larger than 8,000,000,000 bytes" in message


@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_the_limits_are_for_all_members_together(write, make, monkeypatch):
    archive = write(make({"a": bytes(600), "b": bytes(600)}))
    monkeypatch.setattr(download, "MAX_UNPACKED", 1199)
    assert "'b' is refused: the content is larger" in refused(archive)
    monkeypatch.setattr(download, "MAX_UNPACKED", 1200)
    monkeypatch.setattr(download, "MAX_MEMBERS", 1)
    assert "'b' is refused: more than 1 members" in refused(archive)
    monkeypatch.setattr(download, "MAX_MEMBERS", 2)
    assert len(content_of(extract(archive))) == 2


@pytest.mark.parametrize("make", [tar_bytes, zip_bytes])
def test_too_deep_folders_are_refused(write, make):
    """Some 950 folders within one another ended the removal of the temporary folder with a RecursionError."""
    assert "deep" in refused(write(make({"d/" * 950 + "a": b""})))


@pytest.mark.parametrize("size", [10 * 10**9, -1024])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.DIRTYPE])
def test_an_oversized_header_is_refused(write, kind, size):
    """A name of 10 GB was read into memory before any member could be looked at."""
    content = member("name", kind, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(100_000)
    assert f"'name' has a header of {size} bytes" in refused(write(gzip.compress(content)))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_negative_size_is_refused(write, form):
    """It led tarfile back to an earlier member, for ever, and made room below the limit for others."""
    info = member("a", size=-1024, pax_headers={"size": "-1024"})
    assert "'a' is refused: a negative size" in refused(write(info.tobuf(form) + bytes(4096)))


def test_a_sparse_file_is_refused(write):
    assert "sparse" in refused(write(tar_bytes(CHECKPOINT, [member("holes", tarfile.GNUTYPE_SPARSE)])))


def test_a_zip_archive_that_lies_about_a_size_is_refused(write):
    """The central directory says 10 bytes, the stream has a million."""
    content = bytearray(zip_bytes({"zeros": bytes(10**6)}))
    size = content.index(b"PK\1\2") + 24
    assert struct.unpack_from("<I", content, size) == (10**6,)
    struct.pack_into("<I", content, size, 10)
    assert "CRC" in refused(write(bytes(content)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"PK",
        b"PK\3\4",
        b"<html></html>" * 100,
        gzip.compress(b"", mtime=0),
        gzip.compress(b"text" * 999, mtime=0),
        b"\x1f\x8b",
        bytes(10),
        bytes(10240),
    ],
)
def test_what_is_no_archive_is_refused(write, content):
    archive = write(content)
    if content == bytes(10240):  # by the format, an archive without members
        assert content_of(extract(archive)) == {}
    else:
        assert "not a whole tar or zip archive" in refused(archive)


@pytest.mark.parametrize("kind", [*COMPRESS, "zip"])
def test_an_archive_cut_anywhere_is_refused(write, kind):
    """A tar archive that ends between two members was taken for a whole one with fewer of them."""
    files = CHECKPOINT | {"weights": os.urandom(3000)}
    whole = zip_bytes(files) if kind == "zip" else COMPRESS[kind](tar_bytes(files).rstrip(b"\0") + bytes(1024 + 511))
    for length in {0, 1, 512, 1024, 1536, 2048, 2560, *range(0, len(whole) - 1024, 97)}:
        if length < len(whole) - 1024:
            assert "not a whole tar or zip archive" in refused(write(whole[:length]))


@pytest.mark.parametrize("kind", [".gz", ".xz", ".bz2", "zip"])
def test_a_damaged_archive_is_refused(write, kind):
    """The checksum at the end of a .tar.gz was never read."""
    files = {"weights": os.urandom(3000)}
    content = bytearray(zip_bytes(files) if kind == "zip" else COMPRESS[kind](tar_bytes(files)))
    content[1500] ^= 1
    assert "not a whole tar or zip archive" in refused(write(bytes(content)))


def test_a_locked_zip_archive_is_refused(write):
    content = bytearray(zip_bytes(CHECKPOINT))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + offset] |= 1
    assert "encrypted" in refused(write(bytes(content)))


def test_a_missing_archive_is_said(tmp_path):
    assert "No such file" in refusal(extract, tmp_path / "none.tar")


def test_a_member_below_a_file_is_said(write):
    assert "cannot extract" in refused(write(tar_bytes({"a": b"", "a/b": b""})))


def test_a_download_is_extracted_beside_it(server, cache):
    server.answers = [Answer(body=gzip.compress(tar_bytes(CHECKPOINT)))]
    folder = extract(fetch(server.root + "/model.tar.gz"))
    assert folder.parent == cache and content_of(folder) == CHECKPOINT
