"""Download a file once, whole and checked, and take single files out of zip archives."""

import hashlib
import shutil
import stat
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from lit_sigsoftmax.storage import atomic_write, exclusive

__all__ = ["DownloadError", "download", "extract_member"]

# Some mirrors answer 403 to urllib's own name
_HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; lit-sigsoftmax)"}
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 16  # bytes


class DownloadError(OSError):
    """No source gave the file that was asked for."""


def download(urls: Sequence[str], path: Path, *, sha256: str | None = None) -> Path:
    """Fetch a file from the first source that gives it whole, unless ``path`` already exists.

    ``path`` appears at once and complete, after its checksum was verified. Of several processes one downloads while the
    others wait and then find the file.

    Args:
        urls: ``http`` or ``https`` addresses of the same file, in the order to try.
        path: Where to put it; missing folders are made.
        sha256: The file's SHA-256 in hexadecimal, if known.

    Returns:
        ``path``.

    Raises:
        ValueError: If an address is not http(s), or there is none.
        DownloadError: If every source failed: it says what each one gave, and what to do.
        OSError: If ``path`` cannot be written.
    """
    if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
        raise ValueError(f"expected at least one http or https address, got {list(urls)}")
    with exclusive(path):
        if path.exists():
            return path
        failures = []
        for url in urls:
            try:
                _fetch(url, path, sha256)
            except (OSError, HTTPException) as error:
                failures.append(f"  {url}: {error or type(error).__name__}")
            else:
                return path
    raise DownloadError(
        "\n".join([f"could not download {path.name}:", *failures])
        + f"\nPut the file at {path} by hand, or point --data.root at a folder that holds the corpus."
    )


def _fetch(url: str, path: Path, sha256: str | None) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, headers=_HEADERS), timeout=_TIMEOUT) as response:
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("gave a web page, not the file: a login page, a proxy's notice or a mirror that moved")
        expected = response.length  # None if the server did not say
        with atomic_write(path) as file:
            size, digest = _copy(response, file, path.name)
            if expected is not None and size != expected:
                raise DownloadError(f"gave {size:,} of {expected:,} bytes: the connection broke")
            if sha256 is not None and digest != sha256.lower():
                raise DownloadError(f"gave another file ({size:,} bytes, SHA-256 {digest}; expected {sha256.lower()})")


def _copy(response: HTTPResponse, file: BinaryIO, name: str) -> tuple[int, str]:
    """Copy the body and return its size in bytes and its SHA-256."""
    size, digest = 0, hashlib.sha256()
    console = Console(stderr=True)
    columns = (TextColumn(f"Downloading {name}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=response.length)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            progress.update(task, completed=size)
    return size, digest.hexdigest()


def extract_member(archive: Path, member: str, path: Path) -> Path:
    """Write one file of a zip archive to ``path``, unless ``path`` already exists.

    Nothing else in the archive is looked at, and the archive does not choose where anything is written.

    Args:
        archive: The zip file.
        member: The file's name in the archive.
        path: Where to put it.

    Returns:
        ``path``.

    Raises:
        ValueError: If the archive is damaged or lacks the member, or if the member is a link or a folder, or has an
            absolute name or one with ``..``.
        OSError: If ``path`` cannot be written.
    """
    if member.startswith("/") or ".." in PurePosixPath(member).parts:
        raise ValueError(f"{member!r} is outside the archive {archive}")
    with exclusive(path):
        if path.exists():
            return path
        try:
            with zipfile.ZipFile(archive) as content:
                info = content.getinfo(member)
                if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                    raise ValueError(f"{member!r} in {archive} is a link or a folder, not a file")
                with content.open(info) as source, atomic_write(path) as file:
                    shutil.copyfileobj(source, file)
        except KeyError:
            raise ValueError(f"{archive} has no {member!r}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{archive} is damaged ({error}): delete it and try again") from error
    return path
