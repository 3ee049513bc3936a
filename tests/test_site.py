"""The documentation as readers get it: pages built from the sources without Quarto and without a
network by tools/site_preview.py."""
import configparser, contextlib, json, posixpath, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest, yaml

ROOT = Path(__file__).parent.parent
NBS = ROOT/"nbs"
NOTEBOOKS = [NBS/"index.ipynb", *sorted(NBS.glob("[!.]*/[!.]*.ipynb"))]
SOURCES = [*NOTEBOOKS, *sorted(NBS.glob("*.qmd"))]
FOLDERS = ["theory", "foundations", "stages", "runs"]
SECTIONS = ["Lessons", "Run your own", "Experiments", "Reference"]
SILENT = ["pre", "code", "script", "style", "math"]
LEFT_OVER = re.compile(r"\$\$|(?<![\w.])@(?:eq|fig|tbl|sec)-|\[@|:::|\{#|#\||\\tag\b")
SOURCE_LINK = re.compile(r"https://github.com/vcb-nb/vcb_nb/blob/main/vcb_nb/losses.py#L\d+")


def sidebar_entries(contents):
    for item in contents:
        item = {"href": item} if isinstance(item, str) else item
        if "href" in item: yield item["href"]
        yield from sidebar_entries(item.get("contents", []))


def test_the_sidebar_has_every_page_once_in_reading_order():
    settings = yaml.safe_load((NBS/"sidebar.yml").read_text("utf-8"))
    entries = list(sidebar_entries(settings["website"]["sidebar"]["contents"]))
    pages = {path.relative_to(NBS).as_posix() for path in SOURCES} - {"404.qmd"}
    assert sorted(entries) == sorted(pages) and entries[0] == "index.ipynb"
    sections = [item for item in settings["website"]["sidebar"]["contents"] if "href" not in item]
    assert [s["section"] for s in sections[1:]] == SECTIONS
    lessons, *_, reference = (list(sidebar_entries(s["contents"])) for s in sections[1:])
    assert lessons == sorted(lessons) and all(e.startswith("theory/") for e in lessons)
    assert reference == sorted(reference, key=lambda e: (FOLDERS.index(e.split("/")[0]), e))


def test_source_links_have_their_repository():
    "nbdev takes the address from pyproject.toml, and its index of symbols has it."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", "utf-8")
    project, config = (ROOT/"pyproject.toml").read_text("utf-8"), config["DEFAULT"]
    urls = dict(re.findall(r'^(Repository|Documentation) = "(.+)"$', project, re.M))
    assert urls == {"Repository": config["git_url"], "Documentation": config["doc_url"]}
    from vcb_nb._modidx import d
    assert d["settings"]["git_url"] == urls["Repository"], "run make export"


# The site

def need_preview():
    pytest.importorskip("pypandoc", reason="pandoc is missing: pip install pypandoc-binary")


def parsed(page): return pytest.importorskip("bs4").BeautifulSoup(page, "html.parser")


def page_of(path):
    "The page that nbdev makes of a notebook: theory/06_losses.ipynb becomes theory/losses.html."
    relative = path.relative_to(NBS)
    return relative.with_name(re.sub(r"^\d+[a-z]?_", "", relative.stem) + ".html").as_posix()


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site: its folder, each page parsed, by path, and what the tool said."
    need_preview()
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "tools/site_preview.py", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    pages = {p.relative_to(out).as_posix(): parsed(p.read_text("utf-8"))
             for p in out.rglob("*.html")}
    return SimpleNamespace(folder=out, pages=pages, status=done.returncode, said=done.stderr)


def test_the_site_builds_without_a_complaint(site):
    """Equations convert. nbdev can make every page, and warns of cells that mix imports with other
    code, which it runs for API entries."""
    assert site.status == 0 and site.said == ""


def test_every_page_is_there_with_its_beginning(site):
    "nbdev drops what else stands in the title's cell: the badge is what would be missing."
    assert set(site.pages) == {page_of(path) for path in SOURCES}
    for path in NOTEBOOKS:
        page = site.pages[page_of(path)]
        assert page.select_one(".summary"), f"{path}: no `> summary` below the title"
        assert page.select_one('main img[alt="Open in Colab"]'), f"{path}: split the title's cell"


def leads(pages, path, link):
    "Does a link from a page reach a page, and an id there? Links may begin at the site's root."
    file, _, anchor = unquote(link).partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
    target = target.removeprefix("/vcb_nb/")
    return target in pages and (not anchor or pages[target].find(id=anchor))


def test_links_and_anchors_lead_somewhere(site):
    links = [(path, a["href"]) for path, page in site.pages.items() for a in page.select("a[href]")]
    inside = [(path, link) for path, link in links if not re.match("[a-z]+:", link)]
    broken = [f"{path}: {link}" for path, link in inside if not leads(site.pages, path, link)]
    assert len(inside) > 1000 and not broken, "\n".join(broken)


def test_no_image_is_missing_or_fetched(site):
    for path, page in site.pages.items():
        for source in (image["src"] for image in page.select("img")):
            file = (site.folder/path).parent/source
            assert source.startswith("data:") or file.is_file(), f"{path}: {source}"


CAPTION = re.compile(r"(Figure|Table) (\d+)\.$")


def test_figures_and_tables_are_numbered_in_order_and_named_by_number(site):
    "A caption stands below its picture or table; no text names a number that is not there."
    captions = 0
    for path, page in site.pages.items():
        count = {"Figure": 0, "Table": 0}
        for kind, number in (m.groups() for e in page.select("p > em")
                             if (m := CAPTION.match(e.text))):
            count[kind] += 1
            assert int(number) == count[kind], f"{path}: {kind} {number}"
        captions += sum(count.values())
        for kind, number in re.findall(r"\b(Figure|Table)\s(\d+)\b(?! of)", page.main.text):
            assert int(number) <= count[kind], f"{path}: {kind} {number} is not there"
    assert captions > 25


def test_what_is_collapsed_in_a_notebook_is_folded_on_its_page(site):
    hidden = lambda c: c["metadata"].get("jupyter", {}).get("source_hidden")
    for path in NOTEBOOKS:
        cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if hidden(c)]
        folds = site.pages[page_of(path)].select("details.fold > summary")
        assert sum(f.text.strip() != "Exported source" for f in folds) == len(cells), path


def test_no_markup_is_left_in_the_text(site):
    for path, page in site.pages.items():
        texts = page.find_all(string=lambda s: s and LEFT_OVER.search(s))
        left = [text for text in texts if not text.find_parent(SILENT)]
        assert not left, f"{path}: {left}"


def test_ids_are_unique_on_a_page(site):
    for path, page in site.pages.items():
        ids = [tag["id"] for tag in page.select("[id]")]
        assert len(ids) == len(set(ids)), f"{path}: {sorted({i for i in ids if ids.count(i) > 1})}"


def test_explorables_reach_the_page(site):
    "As many on the page as the notebook's stored outputs hold."
    names = lambda soup: sorted(figure["data-vcbx"] for figure in soup.select("div.vcbx"))
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        stored = parsed("".join("".join(data.get("text/html", "")) for data in outputs))
        assert names(site.pages[page_of(path)]) == names(stored), path


def test_exported_functions_show_their_source_link(site):
    "nbdev's own API entries: signature, docments and a link to the line in the repository."
    page = site.pages["theory/losses.html"]
    assert page.find("a", href=SOURCE_LINK, string="source")
    assert page.find("h3", id="vcb_loss") and page.find("h3", id="preference_loss")


def test_equations_are_numbered_in_order_and_named_by_number(site):
    for path, page in site.pages.items():
        numbers = [int(number.text.strip("()")) for number in page.select(".equation > .number")]
        assert numbers == [*range(1, len(numbers) + 1)], path
        assert all(e.find("math") for e in page.select(".equation")), path
        named = re.findall(r"\bequations? \((\d+)\)", page.main.text, re.I)
        assert all(int(number) in numbers for number in named), f"{path}: {named}"


@pytest.mark.slow
def test_explorables_move_on_the_built_pages(site, tmp_path):
    "In a browser, on the pages as they are read: every control of every figure, by keyboard."
    from browser import chromium
    from test_explorables_browser import moved_by_keyboard
    counts = {name: len(page.select("[data-vcbx]")) for name, page in site.pages.items()}
    moving = {name: count for name, count in counts.items() if count}
    assert sum(moving.values()) >= 4
    with chromium(tmp_path) as page:
        page.viewport(1200, 2000)
        for name, figures in moving.items():
            page.open((site.folder/name).as_uri())
            page.wait(f"document.querySelectorAll('.vcbx[data-vcbx-ready]').length >= {figures}")
            for figure in range(figures): assert moved_by_keyboard(page, figure) > 0, name
        assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["theory/what_values_buy.html", "experiments/values_ranks.html"])
def test_letters_of_pictures_can_be_read_on_a_telephone(site, tmp_path, name):
    """Letters of 9 points are 13.75 pixels in a figure's own size, and keep 10 at 360 pixels: the
    figure is shrunk by no more, and scrolls in its box; the page does not."""
    from browser import chromium
    with chromium(tmp_path) as page:
        page.viewport(360, 800)
        page.open((site.folder/name).as_uri())
        page.settle()
        shares, width = page.evaluate("""[[...document.querySelectorAll('img.vcb-figure')].map(
            i => i.getBoundingClientRect().width / i.naturalWidth),
            document.documentElement.scrollWidth]""")
    assert len(shares) >= 2 and min(shares) > .73 and width == 360


# The pages' old addresses

@contextlib.contextmanager
def served(folder):
    "A server that answers as GitHub Pages does: the site under /vcb_nb/, 404.html for the rest."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = folder/self.path.removeprefix("/vcb_nb/")
            found = path.is_file()
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write((path if found else folder/"404.html").read_bytes())

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/vcb_nb/"
    server.shutdown()


@pytest.fixture(scope="session")
def moved(site):
    "404.html's table: where the page of an old address is now."
    rows = [row.select("td") for row in site.pages["404.html"].select("main tbody tr")]
    assert len({old.text for old, _ in rows}) == len(rows) > 20, "an address stands twice"
    return {old.text: new.a["href"].removeprefix("/vcb_nb/") for old, new in rows}


def test_moved_pages_are_there(site, moved):
    assert not set(moved) & set(site.pages) and set(moved.values()) <= set(site.pages)


@pytest.mark.slow
def test_old_addresses_lead_to_todays_pages(site, moved, browser):
    "The script of 404.html takes a reader to the page's new place, and to the same anchor on it."
    with served(site.folder) as address:
        for old, new in moved.items():
            browser.open(f"{address}{old}#part")
            browser.wait(f"location.href === {address + new + '#part'!r}")


# What a page's own syntax becomes

@pytest.fixture(scope="session")
def convert():
    "From a page's Markdown to the page, parsed, and what pandoc complains of."
    need_preview()
    from tools.site_preview import convert
    def made(text):
        page, complaints = convert("---\ntitle: A page\n---\n\n" + text)
        return parsed(page).main, complaints
    return made


PAGE = r"""
By equation (2); `$x$ @eq-none`. From $5 to $10.

$$ x \tag{1} $$

$$
\begin{aligned} y \end{aligned} .
\tag{2} $$

| a | b |
|---|---|
| $p(y|x)$ | 2 |

<details><summary>Solution 1.1</summary>

First $x$.

```
$$ y $$
::: {.callout-note}
```

</details>
"""


def test_a_page_of_everything(convert):
    "Numbers stand beside equations; folds hold mathematics and code; prices are no mathematics."
    page, complaints = convert(PAGE)
    assert complaints == "" and "$x$ @eq-none. From $5 to $10." in page.text
    assert [e.select_one(".number").text for e in page.select(".equation")] == ["(1)", "(2)"]
    assert not page.find(string=lambda s: "tag" in s) and len(page.select("td math")) == 1
    fold = page.select_one("details:not([open])")
    assert fold.summary.text.strip() == "Solution 1.1" and fold.p.math
    assert "::: {.callout-note}" in fold.pre.text


@pytest.mark.parametrize("text", [r"$\nosuchcommand$", r"$\frac{$", "::: note\nopen"])
def test_faults_are_complained_of(convert, text): assert convert(text)[1]


def test_code_cells_do_as_their_options_say(convert):
    "Folded or without code; and an explorable keeps its script, braces and dollars."
    from tools.site_preview import cell_markdown
    explorable = '<div class="vcbx">$x$ @eq-none</div><script>const a = `${1}`; // [@b]\n</script>'

    def cell(source, **data):
        outputs = [{"output_type": "display_data", "data": data}] if data else []
        made, complaints = convert(cell_markdown(
            {"cell_type": "code", "source": source, "outputs": outputs}))
        assert not complaints
        return made

    assert cell("#| echo: false\nx").pre is None and cell("x = 1").details is None
    fold = cell('#| code-fold: true\n#| code-summary: "Solution 1.1"\nx = 1').details
    assert fold.summary.text.strip() == "Solution 1.1" and fold.pre.text.strip() == "x = 1"
    assert explorable in str(cell("x", **{"text/html": [explorable], "text/plain": ["x"]}))
