"""Index, lessons, foundations and experiments run in an empty folder, with only the built wheel."""
import pytest
from notebooks import NOTEBOOKS, kernel, run, wheel
from test_notebooks import HERE


@pytest.mark.notebook
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in HERE], ids=lambda p: p.stem)
def test_lesson(path, wheel, kernel, tmp_path, monkeypatch):
    "The index runs as users start it; the others do not wait for imports."
    if path.stem == "index": kernel = "python3"
    run(path, wheel, tmp_path, monkeypatch, kernel)
