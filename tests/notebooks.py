"""What the tests of notebooks share: the built wheel, and how a notebook is run with it alone."""
import shutil, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from warm_kernel import warm_kernel

from tools.execute import execute

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [ROOT/"nbs"/"index.ipynb", *sorted((ROOT/"nbs").glob("[!.]*/[!.]*.ipynb"))]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The built wheel, unpacked by pip into a folder of its own."
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = out/"source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "*.egg-info"))
    subprocess.run([*pip, "wheel", "--no-deps", "-w", out, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", out/"site", *out.glob("*.whl")],
                   check=True)
    return out/"site"


@pytest.fixture(scope="session")
def kernel():
    "The name of a Jupyter kernel that has its libraries imported when it starts."
    with TemporaryDirectory() as folder: # a short path: that of a socket may have 104 characters
        with warm_kernel(Path(folder)) as name: yield name


def run(path, wheel, folder, monkeypatch, kernel="python3"):
    "Execute a notebook in a folder, with the package that users get."
    monkeypatch.setenv("PYTHONPATH", str(wheel))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    execute(path, folder, kernel)
