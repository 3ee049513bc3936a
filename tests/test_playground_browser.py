"The playground notebook in a real JupyterLab: executed by hand, moved by keyboard and mouse."
from pathlib import Path

import nbformat, pytest
from browser import chromium
from test_explorables_jupyterlab import jupyterlab

ROOT = Path(__file__).parent.parent
IMAGE = "document.querySelector('.jp-OutputArea img.widget-image')"
# The slider's handle by the text of its label.
HANDLE = ("[...document.querySelectorAll('.jp-OutputArea .widget-inline-hbox')]"
          ".find(w => w.querySelector('.widget-label')?.textContent.includes({label!r}))"
          "?.querySelector('.noUi-handle')")
# A hash of the picture's pixels, once it is decoded: one that is being replaced has none.
PIXELS = f"""(async () => {{
  for (let tries = 0; ; tries++)
    try {{ await {IMAGE}.decode(); break }}
    catch (e) {{ if (tries > 300) throw e; await new Promise(requestAnimationFrame) }}
  const image = {IMAGE}, canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data
    .reduce((h, v) => (h * 31 + v) | 0, 7) }})()"""
# Milliseconds from the key's arrival in the page to the frame after the new picture is decoded.
WATCH = f"""window.moved = new Promise(done => {{ let start = 0;
  document.addEventListener('keydown', () => start ||= performance.now(),
                            {{capture: true, once: true}});
  {IMAGE}.addEventListener(
    'load', () => requestAnimationFrame(() => done(performance.now() - start)),
    {{once: true}}) }}), 1"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab with the lesson's cells up to the bench."
    pytest.importorskip("jupyterlab", reason="needs jupyterlab")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    folder = tmp_path_factory.mktemp("playground")
    (folder/"root").mkdir()
    lesson = nbformat.read(ROOT/"nbs"/"theory"/"10_playground.ipynb", 4)
    end = next(i for i, c in enumerate(lesson.cells) if c.source.startswith("playground("))
    lesson.cells = [c for c in lesson.cells[:end + 1] if "#| eval: false" not in c.source]
    nbformat.write(lesson, folder/"root"/"playground.ipynb")
    with chromium(folder) as page, jupyterlab(folder) as address:
        page.viewport(1300, 1000)
        page.open(f"{address}/lab/tree/playground.ipynb")
        page.wait("!!document.querySelector('.jp-Notebook .jp-Cell') && "
                  "!document.querySelector('.jp-LabShell.jp-mod-loading, #jupyterlab-splash')", 180)
        run_all(page)
        yield page


def click_on(page, selector, text):
    "Click in the middle of the visible element that begins with the text."
    found = (f"[...document.querySelectorAll({selector!r})]"
             f".find(e => e.textContent.trim().startsWith({text!r}) && e.getClientRects().length)")
    page.wait(f"!!{found}", 60)
    x, y = page.evaluate("(b => [b.left + b.width/2, b.top + b.height/2])"
                         f"({found}.getBoundingClientRect())")
    # A menu takes no click before the pointer is on it.
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.settle()
    page.click(x, y)


def run_all(page):
    "Once the kernel is idle: menu Run, Run All Cells; wait for the bench's picture."
    accept, ready = ("document.querySelector('.jp-Dialog button.jp-mod-accept')",
                     f"{IMAGE}?.naturalWidth > 0")
    idle = ("document.querySelector('.jp-KernelName, .jp-Toolbar-kernelName')"
            "?.textContent.includes('Python') && "
            "document.querySelector('.jp-Notebook-ExecutionIndicator')"
            "?.dataset.status === 'idle' && "
            "document.querySelectorAll('.jp-Notebook .jp-Cell').length > 20")
    page.wait(f"{accept}?.click() || ({idle})", 180)  # a dialog may ask which kernel to start
    click_on(page, ".lm-MenuBar-item", "Run")
    click_on(page, ".lm-Menu-itemLabel", "Run All Cells")
    page.wait(ready, 240)
    page.evaluate(f"{IMAGE}.scrollIntoView({{block: 'center'}})")
    page.settle()


def handle(label):
    return HANDLE.format(label=label)


@pytest.mark.slow
def test_keys_move_the_picture(lab):
    "Every press of an arrow key on the strength's slider gives another picture; times are printed."
    assert lab.evaluate("!!" + handle("strength"))
    lab.evaluate(handle("strength") + ".focus()")
    times, seen = [], {lab.evaluate(PIXELS)}
    for key in ["ArrowRight"] * 3 + ["ArrowLeft"] * 6:
        lab.evaluate(WATCH)
        lab.key(key)
        times.append(lab.evaluate("moved"))
        seen.add(lab.evaluate(PIXELS))
    print("\nmilliseconds:", [round(t) for t in times])
    assert len(seen) == 7  # three up, three known ones back, three down

    assert lab.evaluate("!document.querySelector('.jp-OutputArea [data-mime-type*=error]')")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["candidates", "world"])
def test_a_drag_moves_the_picture(lab, label):
    "The mouse drags a slider to the right; the picture and the table follow."
    centre = "(b => [b.left + b.width/2, b.top + b.height/2])({}.getBoundingClientRect())"
    table = "document.querySelector('.jp-OutputArea .widget-html table').textContent"
    lab.evaluate(handle(label) + ".scrollIntoView({block: 'center'})")
    lab.settle()
    before, words = lab.evaluate(PIXELS), lab.evaluate(table)
    x, y = lab.evaluate(centre.format(handle(label)))
    lab.drag((x, y), (x + 60, y))
    lab.wait(f"{table} !== {words!r}", 60)
    assert lab.evaluate(PIXELS) != before


@pytest.mark.slow
def test_controls_speak(lab):
    "Every control has a label in words, and the table repeats the picture in figures."
    labels = lab.evaluate("[...document.querySelectorAll('.jp-OutputArea .widget-label')]"
                          ".map(e => e.textContent)")
    for label in ("first method", "second method", "strength γ", "candidates", "world"):
        assert label in labels
    heads = lab.evaluate("[...document.querySelectorAll('.jp-OutputArea .widget-html th')]"
                         ".map(e => e.textContent)")
    assert {"KL to optimum", "KL to SFT", "reward", "efficiency"} <= set(heads)
