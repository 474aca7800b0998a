"""Fetches Hugging Face's model test mixins, which Transformers' source distribution carries and its wheel does not.

The files keep their relative imports and are imported as `transformers_tests`, so that they do not clash with this
project's own `tests`. The distribution holds the top level of upstream's `tests/` only: `standins/` provides, under
the names upstream uses, the few modules those files import from below it.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "conformance"
PACKAGE = "transformers_tests"
# joins the download and the stand-ins in one package; upstream reads this file, so that it has to exist
INIT = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"


def search_path(version: str) -> list[str]:
    """The folders to put on `sys.path` for `import transformers_tests`, downloading the release on first use."""
    root = CACHE / version
    if not root.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _unpack(_download(version, Path(folder)), Path(folder) / "tree" / PACKAGE)
            (Path(folder) / "tree").rename(root)
    return [str(root), str(HERE / "standins")]


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*command, "--dest", str(folder), f"transformers=={version}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def _unpack(archive: Path, destination: Path) -> None:
    destination.mkdir(parents=True)
    (destination / "__init__.py").write_text(INIT)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                (destination / path.name).write_bytes(tar.extractfile(member).read())
