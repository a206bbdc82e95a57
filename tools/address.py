"""Where this repository can be seen, taken from the clone at hand: it says so nowhere else.

``setup.py`` runs this file for the links of the package, ``docs/_hooks.py`` for that of the site.
Both go without where there is none: a clone of a folder, an archive, a host that is not public.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["address", "here", "links"]

ROOT = Path(__file__).resolve().parent.parent
# A name that others may know: a machine's own, or a number, is none.
HOST = re.compile(r"(?:[a-z0-9-]+\.)+[a-z]{2,}")
PATH = re.compile(r"[\w.~-]+(?:/[\w.~-]+)+")
PAGES = {
    "Source": "",
    "Documentation": "/tree/HEAD/docs",
    "Changelog": "/blob/HEAD/CHANGELOG.md",
    "Issues": "/issues",
}


def address(remote: str) -> str | None:
    """The page of a remote of git's, without user, password or ``.git``."""
    # git@host:owner/name
    scp = re.fullmatch(r"(?:[^@/\s]+@)?([^@:/\s]+):(?!//)([^:\s]+)", remote.strip())
    if scp:
        scheme, host, port, path = "ssh", scp[1], None, scp[2]
    else:
        try:
            parts = urlsplit(remote.strip())
            scheme, host, port, path = parts.scheme, parts.hostname or "", parts.port, parts.path
        except ValueError:  # a port that is none
            return None
    path = path.strip("/").removesuffix(".git")
    hidden = any(step.startswith(".") for step in path.split("/"))
    if not HOST.fullmatch(host.lower()) or not PATH.fullmatch(path) or hidden:
        return None
    if scheme in ("ssh", "git", "git+ssh"):
        return f"https://{host.lower()}/{path}"
    if scheme not in ("http", "https"):
        return None
    return f"{scheme}://{host.lower()}{'' if port is None else f':{port}'}/{path}"


def here(root: Path = ROOT) -> str | None:
    """The page of the clone's ``origin``. A folder inside somebody else's clone has none."""
    if not (root / ".git").exists():
        return None
    ask = ["git", "-c", "safe.directory=*", "config", "--get", "remote.origin.url"]
    try:
        found = subprocess.run(ask, cwd=root, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return address(found.stdout) if found.returncode == 0 else None


def links(root: Path = ROOT) -> dict[str, str]:
    """What a package index shows beside the project; empty where there is no page. The source of a
    release has no clone any more, and says what was written into it."""
    page = here(root)
    if page is not None:
        return {name: page + path for name, path in PAGES.items()}
    written = root / "PKG-INFO"
    if (root / ".git").exists() or not written.is_file():
        return {}
    head = written.read_text(encoding="utf-8").split("\n\n", 1)[0]
    return dict(re.findall(r"^Project-URL: (\w+), (\S+)$", head, re.M))
