import hashlib
import http.server
import io
import multiprocessing
import stat
import threading
import time
import zipfile

import pytest

from lit_sigsoftmax.data.download import DownloadError, download, extract_member

BODY = b"the corpus\n" * 20_000
SHA256 = hashlib.sha256(BODY).hexdigest()
fork = multiprocessing.get_context("fork")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        name = self.path.lstrip("/")
        if name == "missing":
            self.send_error(404)
            return
        if self.headers["User-Agent"].startswith("Python-urllib"):  # as one mirror of WikiText-2 does
            self.send_error(403)
            return
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            self.end_headers()
            return
        if name == "slow":
            time.sleep(0.3)
        body = {"wrong": b"something else", "page": b"<!doctype html><p>Log in"}.get(name, BODY)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if name == "page" else "application/zip")
        if name != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-500] if name == "truncated" else body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def direct(monkeypatch, server):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.requests.clear()


@pytest.mark.parametrize("name", ["good", "moved", "unsized"])
@pytest.mark.parametrize("sha256", [SHA256, SHA256.upper(), None])
def test_download(server, tmp_path, name, sha256):
    path = tmp_path / "new" / "folder" / "corpus.zip"
    assert download([f"{server.url}/{name}"], path, sha256=sha256) == path
    assert path.read_bytes() == BODY
    assert {file.name for file in path.parent.iterdir()} <= {"corpus.zip", "corpus.zip.lock"}


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    path = tmp_path / "corpus.zip"
    path.write_bytes(b"put here by hand")
    download([f"{server.url}/good"], path, sha256=SHA256)
    assert path.read_bytes() == b"put here by hand"
    assert server.requests == []


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        ("truncated", None, r"gave 219,500 of 220,000 bytes"),
        ("wrong", SHA256, rf"gave another file \(14 bytes, SHA-256 [0-9a-f]{{64}}; expected {SHA256}\)"),
        ("missing", SHA256, "404"),
        ("page", None, "gave a web page"),
    ],
)
def test_a_bad_answer_leaves_nothing_and_says_what_to_do(server, tmp_path, name, sha256, message):
    path = tmp_path / "corpus.zip"
    with pytest.raises(DownloadError, match=message) as caught:
        download([f"{server.url}/{name}"], path, sha256=sha256)
    for part in (f"{server.url}/{name}", str(path), "--data.root"):
        assert part in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} <= {"corpus.zip.lock"}
    download([f"{server.url}/good"], path)  # and the next attempt is free to succeed
    assert path.read_bytes() == BODY


def test_sources_are_tried_in_order(server, tmp_path):
    path = tmp_path / "corpus.zip"
    names = ["missing", "page", "truncated", "wrong", "good", "unsized"]
    download([f"{server.url}/{name}" for name in names], path, sha256=SHA256)
    assert path.read_bytes() == BODY
    assert server.requests == ["/missing", "/page", "/truncated", "/wrong", "/good"]


def test_every_failed_source_is_named(server, tmp_path):
    urls = [f"{server.url}/missing", f"{server.url}/wrong", "http://127.0.0.1:9/refused"]
    with pytest.raises(DownloadError) as caught:
        download(urls, tmp_path / "corpus.zip", sha256=SHA256)
    assert all(url in str(caught.value) for url in urls)
    assert "404" in str(caught.value)
    assert "refused" in str(caught.value)


@pytest.mark.parametrize("urls", [[], ["file:///etc/hostname"], ["https://example.org/a", "ftp://example.org/a"]])
def test_only_http_addresses(tmp_path, urls):
    with pytest.raises(ValueError, match="http or https"):
        download(urls, tmp_path / "corpus.zip")
    assert not list(tmp_path.iterdir())


def test_of_several_processes_one_downloads(server, tmp_path):
    path, barrier = tmp_path / "corpus.zip", fork.Barrier(3)

    def work():
        barrier.wait(10)
        assert download([f"{server.url}/slow"], path, sha256=SHA256).read_bytes() == BODY

    children = [fork.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(10)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert server.requests == ["/slow"]


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file"):
        download([f"{server.url}/good"], tmp_path / "file" / "corpus.zip")
    assert server.requests == []


# Archives


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "corpus.zip"
    link = zipfile.ZipInfo("folder/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("folder/text", BODY)
        content.writestr("../evil", b"outside")
        content.writestr("/absolute", b"outside")
        content.writestr(link, "/etc/hostname")
        content.writestr("folder/empty/", b"")
    return path


def test_a_member_is_extracted_and_nothing_else(archive, tmp_path):
    folder = tmp_path / "a" / "b"
    assert extract_member(archive, "folder/text", folder / "text") == folder / "text"
    assert (folder / "text").read_bytes() == BODY
    assert {path.name for path in folder.iterdir()} <= {"text", "text.lock"}
    assert {path.name for path in tmp_path.rglob("*")} <= {"corpus.zip", "a", "b", "text", "text.lock"}
    archive.unlink()
    extract_member(archive, "folder/text", folder / "text")  # already there


@pytest.mark.parametrize("member", ["../evil", "/absolute", "folder/link", "folder/empty/"])
def test_members_that_are_no_plain_files_are_refused(archive, tmp_path, member):
    with pytest.raises(ValueError, match=r"outside the archive|a link or a folder"):
        extract_member(archive, member, tmp_path / "out" / "file")
    assert {path.name for path in tmp_path.rglob("*")} <= {"corpus.zip", "out", "file.lock"}


def test_a_missing_member_is_named(archive, tmp_path):
    with pytest.raises(ValueError, match=r"corpus.zip has no 'folder/other'"):
        extract_member(archive, "folder/other", tmp_path / "file")


def flip(data, offset):
    return data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"<html>", lambda data: data[:-10], lambda data: flip(data, 41), lambda data: flip(data, 100)],
    ids=["not a zip", "cut", "first block", "content"],
)
def test_a_damaged_archive_is_named_and_leaves_nothing(archive, tmp_path, damage):
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=r"corpus.zip is damaged .*delete it"):
        extract_member(archive, "folder/text", tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} <= {"corpus.zip", "file.lock"}


def test_an_interrupted_extraction_leaves_nothing(archive, tmp_path, monkeypatch):
    def interrupted(source, file):
        file.write(source.read(10))
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_member(archive, "folder/text", tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} <= {"corpus.zip", "file.lock"}


def test_a_terminal_shows_progress(server, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        download([f"{server.url}/good"], tmp_path / f"{shown}.zip")
        assert (f"Downloading {shown}.zip" in stream.getvalue()) is shown
