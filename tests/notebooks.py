"""What the tests of notebooks share: the built wheel, and how a notebook is run with it alone."""
import os, shutil, subprocess, sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock
from warm_kernel import warm_kernel

from tools.execute import execute

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [ROOT/"nbs"/"index.ipynb", *sorted((ROOT/"nbs").glob("[!.]*/[!.]*.ipynb"))]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The built wheel, unpacked by pip into a folder of its own: once for all workers."
    out = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: out = out.parent
    with FileLock(out/"wheel.lock"):
        if not (out/"wheel").exists(): build_wheel(out/"wheel")
    return out/"wheel"/"site"


def build_wheel(out):
    "The wheel in a folder, and its content in `site` below it; nothing where it fails."
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    part, source = out.with_suffix(".part"), out.with_suffix(".source")
    for folder in (part, source): shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "*.egg-info"))
    subprocess.run([*pip, "wheel", "--no-deps", "-w", part, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", part/"site", *part.glob("*.whl")],
                   check=True)
    part.rename(out)


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
