"A figure in a real JupyterLab: run by a user's hand, moved by keyboard, and read untrusted."
import contextlib, os, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import nbformat, pytest
from browser import chromium

from test_explorables_browser import moved_by_keyboard
from vcb_nb.explorables import EXPLORABLES, order_value

ROOT = Path(__file__).parent.parent
CODE = "from vcb_nb.explorables import order_value\norder_value()"
CELL = "document.querySelector('.jp-Notebook .jp-CodeCell')"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def notebook(path, outputs=(), code=CODE):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cell = nbformat.v4.new_code_cell(code, outputs=list(outputs))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), path)


@contextlib.contextmanager
def jupyterlab(folder):
    "A server without token on this machine only, its settings below `folder`; yields its address."
    port, state = free_port(), {f"JUPYTER_{k}_DIR": str(folder/k) for k in ("CONFIG", "RUNTIME")}
    where = {"PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(folder/"settings"),
             "JUPYTERLAB_WORKSPACES_DIR": str(folder/"workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
               f"--port={port}",
               "--allow-root", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
               "--ServerApp.password=",
               f"--ServerApp.root_dir={folder/'root'}", "--LabApp.extension_manager=readonly",
               "--LabApp.news_url=",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    server = subprocess.Popen(command, env=os.environ | state | where, stdout=subprocess.DEVNULL,
                              stderr=(folder/"server.log").open("w"))
    try:
        opener, end = (urllib.request.build_opener(urllib.request.ProxyHandler({})),
                       time.monotonic() + 120)
        while True:
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/api/status", timeout=2).close()
                break
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail("JupyterLab did not start: "
                            + (folder/"server.log").read_text()[-1500:])
            time.sleep(.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()  # the server shuts its kernels down
        with contextlib.suppress(subprocess.TimeoutExpired): server.wait(15)
        if server.poll() is None: server.kill()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    pytest.importorskip("jupyterlab", reason="needs jupyterlab")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    folder = tmp_path_factory.mktemp("lab")
    (folder/"root").mkdir()
    notebook(folder/"root"/"run.ipynb")
    notebook(folder/"root"/"all.ipynb", code="from IPython.display import display\n"
             "from vcb_nb.explorables import EXPLORABLES\n"
             "display(*(make() for make in EXPLORABLES.values()))")
    html = {"text/html": order_value()._repr_html_(), "text/plain": order_value().alt}
    output = nbformat.v4.new_output("execute_result", html, execution_count=1)
    notebook(folder/"root"/"stored.ipynb", [output])
    with chromium(folder) as page, jupyterlab(folder) as address:
        page.viewport(1200, 1400)
        yield page, address


def open_notebook(page, address, name):
    page.open(f"{address}/lab/tree/{name}?reset")  # not the tabs of the test before
    page.wait(f"!!{CELL} && !document.querySelector('.jp-LabShell.jp-mod-loading, "
              "#jupyterlab-splash')", 120)


def run_first_cell(page):
    "Click and Shift-Enter as a user would, once the kernel is there: before, nothing would run."
    ready = ("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle' "
             "&& "
             "document.querySelector('.jp-Toolbar-kernelName')?.textContent.startsWith('Python')")
    page.wait(ready, 120)
    middle = ("(b => [b.left + 200, b.top + 12])"
              f"({CELL}.querySelector('.cm-content').getBoundingClientRect())")
    page.click(*page.evaluate(middle))
    page.wait("document.activeElement.matches('.cm-content')")
    page.key("Enter", modifiers=8)
    page.wait("!!document.querySelector('.jp-OutputArea .vcbx[data-vcbx-ready] svg')", 120)


@pytest.mark.slow
def test_runs_and_moves_in_jupyterlab(lab):
    "Shift-Enter draws it; the arrow keys move its slider and not the notebook's cells."
    page, address = lab
    open_notebook(page, address, "run.ipynb")
    run_first_cell(page)
    assert page.evaluate("document.querySelectorAll('.jp-OutputArea .vcbx').length") == 1
    markup = ("[...document.querySelectorAll('.jp-OutputArea .vcbx svg')]"
              ".map(n => n.outerHTML).join()")
    active = ("[...document.querySelectorAll('.jp-Notebook .jp-Cell')]"
              ".findIndex(c => c.matches('.jp-mod-active'))")
    for selector in (".vcbx input[type=range]", ".vcbx svg [role=slider]"):
        page.evaluate(f"document.querySelector('.jp-OutputArea {selector}').focus()")
        before, cell = page.evaluate(markup), page.evaluate(active)
        for key in ("ArrowUp", "ArrowUp", "ArrowRight"): page.key(key)
        page.settle()
        assert page.evaluate(markup) != before
        assert page.evaluate("document.activeElement === document.querySelector('.jp-OutputArea "
                             f"{selector}')")
        assert page.evaluate(active) == cell
    assert [e for e in page.errors if "vcbx" in e.lower()] == []


@pytest.mark.slow
def test_every_control_of_every_figure_moves_in_jupyterlab(lab):
    page, address = lab
    open_notebook(page, address, "all.ipynb")
    run_first_cell(page)
    ready = "document.querySelectorAll('.jp-OutputArea .vcbx[data-vcbx-ready]').length"
    page.wait(f"{ready} === {len(EXPLORABLES)}", 60)
    for figure in range(len(EXPLORABLES)): assert moved_by_keyboard(page, figure) > 0


@pytest.mark.slow
def test_untrusted_notebook_shows_the_words(lab):
    "JupyterLab strips the script of an output that it does not trust: the text in words is left."
    page, address = lab
    open_notebook(page, address, "stored.ipynb")
    text = "[...document.querySelectorAll('.jp-OutputArea')].map(n => n.textContent).join()"
    page.wait(f"{text}.includes('VCB spaces')", 60)
    assert order_value().alt in page.evaluate(text)
    assert page.evaluate("document.querySelectorAll('.vcbx-panel').length") == 0
