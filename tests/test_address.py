"""The links of the package are those of the clone it is built from, and nothing that is private."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools.address import PAGES, address, here, links

PAGE = "https://code.example.org/owner/name"


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://code.example.org/owner/name.git", PAGE),
        ("https://code.example.org/owner/name/\n", PAGE),
        ("https://user:secret@Code.Example.org/owner/name.git", PAGE),
        ("https://code.example.org:8443/group/part/name", f"{PAGE[:24]}:8443/group/part/name"),
        ("http://code.example.org/owner/name", PAGE.replace("https", "http")),
        ("git@code.example.org:owner/name.git", PAGE),
        ("code.example.org:owner/name", PAGE),
        ("ssh://git@code.example.org:22/owner/name.git", PAGE),
        ("git://code.example.org/owner/name", PAGE),
    ],
)
def test_an_address_is_a_page(remote: str, page: str) -> None:
    assert address(remote) == page


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "/srv/git/name.git",
        "../name",
        "file:///srv/git/owner/name",
        "C:/owner/name",
        "https://localhost/owner/name",
        "http://user:secret@127.0.0.1:8080/owner/name",
        "git@machine:owner/name.git",
        "https://code.example.org",
        "https://code.example.org/name",
        "https://code.example.org/../name",
        "https://code.example.org:port/owner/name",
        "https://code.example.org/owner/name with spaces",
        "ftp://code.example.org/owner/name",
        "ext::sh -c true",
    ],
)
def test_what_nobody_else_can_open_is_none(remote: str) -> None:
    assert address(remote) is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_clone_knows_its_page_and_an_archive_what_was_written(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert links(tmp_path) == {}
    git("remote", "add", "origin", "git@code.example.org:owner/name.git")
    found = links(tmp_path)
    assert found.keys() == PAGES.keys()
    assert found["Source"] == PAGE
    assert found["Issues"] == f"{PAGE}/issues"
    # In a folder of somebody else's clone, as a vendored copy is.
    archive = tmp_path / "archive"
    archive.mkdir()
    assert here(archive) is None
    assert links(archive) == {}
    head = "".join(f"Project-URL: {name}, {page}\n" for name, page in found.items())
    text = f"Metadata-Version: 2.4\nName: name\n{head}\nProject-URL: No, https://example.org/no\n"
    (archive / "PKG-INFO").write_text(text, encoding="utf-8")
    assert links(archive) == found
