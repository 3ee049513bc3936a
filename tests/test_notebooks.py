"""The notebooks of stages and runs, from top to bottom in an empty folder, with the built wheel.

The lessons' shared run is made once, by the first notebook that needs it, and copied into the
folder of the others: what is tested is the notebook, not the making of the same small models
again. Lessons and foundations are in test_lessons: two halves, for two workers."""
import os, re, shutil, subprocess, sys, venv

import nbformat, pytest
from notebooks import NOTEBOOKS, ROOT, kernel, run, wheel

from tools.execute import execute, skipped

HERE = [path for path in NOTEBOOKS if path.parent.name in ("stages", "runs")]


@pytest.mark.notebook
def test_the_wheel_holds_the_library_alone(wheel):
    "Keeps benchmarks, tests and tools out of the users' site-packages."
    found = {p.name for p in wheel.iterdir() if p.suffix != ".dist-info"}
    assert found - {"bin", "__pycache__"} == {"vcb_nb"}


@pytest.fixture(scope="session")
def shared(tmp_path_factory): return tmp_path_factory.mktemp("shared")


@pytest.mark.notebook
@pytest.mark.parametrize("path", HERE, ids=lambda p: p.stem)
def test_notebook(path, wheel, kernel, shared, tmp_path, monkeypatch):
    if path.stem in ("00_your_model", "10_lora"):
        if not os.environ.get("VCB_REAL"): pytest.skip("minutes with a real model: make test-real")
        (tmp_path/"runs").mkdir()
        (tmp_path/"runs"/"smollm2").symlink_to(ROOT/"runs"/"smollm2")
    if path.stem in ("09_study", "12_online") and not os.environ.get("VCB_STUDY"):
        pytest.skip("minutes of training: make test-study")
    if (shared/"lesson").exists(): shutil.copytree(shared/"lesson", tmp_path/"runs"/"lesson")
    run(path, wheel, tmp_path, monkeypatch, kernel)
    if (tmp_path/"runs"/"lesson").exists():
        shutil.rmtree(shared/"lesson", ignore_errors=True)
        shutil.move(tmp_path/"runs"/"lesson", shared/"lesson")


def test_a_cell_for_colab_alone_is_not_run(tmp_path):
    "Its output would be none of ours; every other cell has one, in the order of the page."
    cells = ["x = 1", "#| eval: false\nx = 2", "x"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="installed")]
    nbformat.write(notebook, tmp_path/"lesson.ipynb")
    ran = execute(tmp_path/"lesson.ipynb")
    assert [cell.source for cell in ran.cells] == cells
    assert [cell.execution_count for cell in ran.cells] == [1, None, 2]
    assert ran.cells[1].outputs == [] and ran.cells[2].outputs[0].data["text/plain"] == "1"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_its_form(path):
    """A title, a summary, a Colab badge, stored outputs without errors and without the folders of
    the machine that ran it, and no stored widget state; what is for Colab only was not run here."""
    notebook = nbformat.read(path, 4)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert text.lstrip().startswith("# ") and "\n> " in text
    relative = path.relative_to(ROOT/"nbs").as_posix()
    assert f"colab.research.google.com/github/vcb-nb/vcb_nb/blob/main/nbs/{relative}" in text
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert (not [o for o in outputs if o.output_type == "error"]
            and "widgets" not in notebook.metadata)
    said = "".join(str(o.get("text") or o.get("data", {}).get("text/plain")) for o in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/|site-packages", said)
    assert not any(c.outputs for c in notebook.cells if skipped(c))


def test_library_is_what_the_notebooks_export(tmp_path):
    "Export into an empty folder: each module equals the committed one."
    nbdev = pytest.importorskip("nbdev.export")
    (tmp_path/"vcb_nb").mkdir()
    for path in NOTEBOOKS: nbdev.nb_export(path, lib_path=tmp_path/"vcb_nb")
    for made in (tmp_path/"vcb_nb").glob("[!_]*.py"):
        body = lambda p: [l for l in p.read_text("utf-8").splitlines()
                          if "File to edit" not in l and not l.startswith("# %%")]
        assert body(made) == body(ROOT/"vcb_nb"/made.name), f"{made.name}: run nbdev-export"


def test_readme_is_the_index():
    from tools.readme import readme
    assert (ROOT/"README.md").read_text("utf-8") == readme(), "run make export"


QUARTO = re.compile(r"(?<![\w.])@(?:eq|fig|tbl|sec)-|\[-?@[a-z]|:::|\{[#.][a-z]|\{\{<|\$\$", re.I)
OPTIONS = re.compile(r"^#\|(?! *(?:default_exp|exporti?s?|hide|eval)\b).*", re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_in_jupyter(path):
    """Nothing that only Quarto understands stands in the text that Jupyter renders or in the code;
    folds are closed in their cell, and pictures have an alternative text."""
    from bs4 import BeautifulSoup
    from nbconvert.filters import markdown2html
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code": assert not OPTIONS.findall(cell.source), path
        if cell.cell_type != "markdown": continue
        assert cell.source.count("<details>") == cell.source.count("</details>"), cell.source
        page = BeautifulSoup(markdown2html(re.sub(r"\$\$.*?\$\$", "", cell.source, flags=re.S)),
                             "html.parser")
        for code in page.select("pre, code"): code.decompose()
        assert not QUARTO.findall(page.text), cell.source
        assert all(image.get("alt") for image in page.select("img")), cell.source


def install_cell(path):
    "The source of the cell that fetches the library."
    cells = nbformat.read(path, 4).cells
    [cell] = [c.source for c in cells if c.cell_type == "code" and "fetch the library" in c.source]
    first = next(c.source for c in cells if c.cell_type == "code" and "default_exp" not in c.source)
    assert cell == first, f"{path}: it must come before all other code"
    return cell


def test_every_notebook_has_the_same_install_cell():
    assert len(set(map(install_cell, NOTEBOOKS))) == 1


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "The interpreter of an environment with pip and nothing else."
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return folder/"bin"/"python"


@pytest.mark.slow
def test_the_install_cell_installs_once_or_says_why_not(wheel, bare):
    """Without a network it does nothing where the library is, takes it from an index that has it,
    and else ends with one sentence. (An index is a folder here; GitHub is nowhere.)"""
    nowhere = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "url.file:///nowhere/.insteadOf",
               "GIT_CONFIG_VALUE_0": "https://github.com/", "PIP_NO_INDEX": "1",
               "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_DEPS": "1"}
    def cell(python, **more):
        env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **nowhere, **more}
        return subprocess.run([python, "-c", install_cell(NOTEBOOKS[0])], env=env,
                              capture_output=True, text=True, cwd=wheel.parent)
    here = cell(sys.executable, PYTHONPATH=str(wheel))
    assert (here.returncode, here.stdout, here.stderr) == (0, "", "")
    none = cell(bare)
    assert none.returncode == 1 and none.stderr.splitlines()[-1].startswith("vcb_nb could be had")
    index = dict(PIP_FIND_LINKS=str(wheel.parent))
    assert cell(bare, **index).returncode == 0
    assert subprocess.run([bare, "-c", "import importlib.metadata as m; m.version('vcb-nb')"],
                          cwd=wheel.parent).returncode == 0
    assert cell(bare).returncode == 0          # now it is there


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_fits_its_column(path):
    "A line of over 100 columns is cut on the page at 1280 pixels."
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    wide = [line for c in cells if "#| hide" not in c.source for line in c.source.splitlines()
            if len(line) > 100]
    assert not wide, wide




def undescribed(cell):
    "The stored outputs of a cell that hold a picture without an alternative text."
    from bs4 import BeautifulSoup
    for data in (output.get("data", {}) for output in cell.get("outputs", [])):
        images = BeautifulSoup("".join(data.get("text/html", "")), "html.parser").select("img")
        bare = not images and any(kind.startswith("image/") for kind in data)
        if bare or not all(image.get("alt", "").strip() for image in images): yield data


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_pictures_have_an_alternative_text(path):
    "A cell that plots ends with `show_figure(figure, alt)`."
    for cell in nbformat.read(path, 4).cells: assert not [*undescribed(cell)], cell.source


@pytest.mark.parametrize("data, described", [
    ({"image/png": "iVBORw0"}, False), ({"image/svg+xml": "<svg/>"}, False),
    ({"text/html": "<img src='data:,'>"}, False), ({"text/html": "<img alt=' '>"}, False),
    ({"image/png": "iVBORw0", "text/html": "<p>A table</p>"}, False),
    ({"text/html": "<img alt='A line'>"}, True), ({"text/plain": "1"}, True)])
def test_a_picture_without_an_alternative_text_is_noticed(data, described):
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])
    assert described == (not [*undescribed(cell)])
