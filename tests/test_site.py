"""The documentation: sources in Quarto's own syntax, and a site built from them without Quarto.

The site is built once, by tools/site_preview.py, without a network."""
import configparser, importlib.util, json, posixpath, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT/"nbs"
NOTEBOOKS = [NBS/"index.ipynb", *sorted(NBS.glob("[!.]*/[!.]*.ipynb"))]
SOURCES = [*NOTEBOOKS, *sorted(NBS.glob("*.qmd"))]
QUOTED = re.compile(r"^(`{3,}|~{3,})[\s\S]*?^\1[ ]*$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.M)
LABEL = re.compile(r"\{#((?:eq|fig|tbl|sec)-[\w-]+)")
EQUATION_LABEL = re.compile(r"\{#(eq-[\w-]+)\}")
CITATION = re.compile(r"(?<![\w@./])@([A-Za-z][\w-]*\w)")
GROUP = re.compile(r"\[[^\[\]]*@[^\[\]]*\]")
CROSS_REFERENCE = re.compile(r"(eq|fig|tbl|sec)-")


def name(path): return path.relative_to(NBS).with_suffix("").as_posix()


def tool(module):
    "A module of tools/, which is no package."
    spec = importlib.util.spec_from_file_location(module, ROOT/"tools"/f"{module}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def cells(path, kind=None):
    "(cell type, source) of each cell; a `.qmd` page is one markdown cell."
    text = path.read_text("utf-8")
    if path.suffix == ".qmd": found = [("markdown", text)]
    else: found = [(c["cell_type"], "".join(c["source"])) for c in json.loads(text)["cells"]]
    return [c for c in found if kind in (None, c[0])]


def prose(path):
    "The page's markdown without code, cell by cell."
    return [QUOTED.sub("`code`", text) for _, text in cells(path, "markdown")]


def options(source): return dict(re.findall(r"^#\|\s*([\w-]+)\s*:\s*(.*?)\s*$", source, re.M))


def bibliography():
    text = (NBS/"references.bib").read_text("utf-8")
    return {key: (kind, dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?$", body, re.M)))
            for kind, key, body in re.findall(r"^@(\w+)\{([\w-]+),\n(.*?)^\}", text, re.M | re.S)}


def sidebar_entries(contents):
    for item in contents:
        item = {"href": item} if isinstance(item, str) else item
        if "href" in item: yield item["href"]
        yield from sidebar_entries(item.get("contents", []))


def sidebar():
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((NBS/"sidebar.yml").read_text("utf-8"))
    return list(sidebar_entries(settings["website"]["sidebar"]["contents"]))


# The sources, as Quarto and nbdev want them

def test_every_page_is_in_the_sidebar_once_and_every_entry_exists():
    entries = sidebar()
    assert sorted(entries) == sorted(set(entries)), "an entry stands twice"
    assert set(entries) == {p.relative_to(NBS).as_posix() for p in SOURCES}


def test_sidebar_keeps_the_reading_order():
    entries = sidebar()
    assert entries[0] == "index.ipynb"
    for folder in ("theory", "pipeline", "runs"):
        inside = [e for e in entries if e.startswith(folder + "/")]
        assert inside == sorted(inside)
    folders = [e.split("/")[0] for e in entries if "/" in e]
    assert list(dict.fromkeys(folders)) == ["theory", "pipeline", "runs"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_tidy(path):
    "The title stands alone, and imports stand alone where nbdev runs them to build the page."
    tidy = tool("tidy_cells").tidy
    notebook = json.loads(path.read_text("utf-8"))
    is_tidy = tidy(notebook) == notebook
    assert is_tidy, "run: python tools/tidy_cells.py"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_fences_are_balanced(path):
    "`:::` blocks close within the page; callouts are of Quarto's five kinds."
    depth = 0
    for text in prose(path):
        for line in re.findall(r"^:{3,}.*$", text, re.M):
            opening = line.strip(": \t")
            depth += 1 if opening else -1
            assert depth >= 0, f"{line!r} closes nothing"
            kind = re.search(r"\.callout-([\w-]+)", opening)
            assert not kind or kind[1] in ("note", "tip", "important", "warning", "caution"), line
    assert depth == 0


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_equations_are_closed_and_labelled_in_quartos_way(path):
    for text in prose(path):
        assert text.count("$$") % 2 == 0, text[:80]
        parts = text.split("$$")
        after, inside = parts[2::2], parts[1::2]
        labelled = [part for part in after if part.lstrip().startswith("{#")]
        assert all(re.match(r" \{#eq-[a-z0-9-]+\}[ .,;]*(\n|$)", part) for part in labelled)
        assert sum(map(len, map(EQUATION_LABEL.findall, inside))) == 0, "a label inside $$"
        assert len(EQUATION_LABEL.findall(text)) == len(labelled), "a label away from its $$"


def test_labels_are_unique_over_the_book():
    seen = {}
    for path in SOURCES:
        found = [label for text in prose(path) for label in LABEL.findall(text)]
        found += [options(code).get("label") for _, code in cells(path, "code")]
        for label in filter(None, found):
            assert label not in seen, f"{label} in {name(path)} and {seen[label]}"
            seen[label] = name(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_labelled_figures_can_be_read_and_heard(path):
    "A figure's label starts with fig-; a labelled figure has a caption and an alternative text."
    for _, code in cells(path, "code"):
        own = options(code)
        if "label" not in own: continue
        assert re.fullmatch(r"(fig|tbl)-[a-z0-9-]+", own["label"]), own["label"]
        figure = own["label"].startswith("fig-")
        assert not figure or (own.get("fig-cap") and own.get("fig-alt")), own["label"]
        first = code.splitlines()[:len(re.findall(r"^#\|", code, re.M))]
        assert all(line.startswith("#|") for line in first), "options stand at the top of a cell"


def test_bibliography_is_well_formed_and_every_cited_key_is_in_it():
    text, entries = (NBS/"references.bib").read_text("utf-8"), bibliography()
    assert len(entries) == len(re.findall(r"^@", text, re.M)), "an entry does not parse"
    for key, (kind, fields) in entries.items():
        assert {"author", "title", "year"} <= set(fields), key
        assert re.fullmatch(r"\d{4}", fields["year"]) and key.endswith(fields["year"]), key
        arxiv = re.fullmatch(r"\d{4}\.\d{4,5}", fields.get("eprint", ""))
        assert "url" in fields or arxiv, f"no address for {key}"
    groups = [group for path in SOURCES for text in prose(path) for group in GROUP.findall(text)]
    cited = {key for group in groups for key in CITATION.findall(group)}
    assert {key for key in cited if not CROSS_REFERENCE.match(key)} <= set(entries)


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

ADDRESS = re.compile(r"[a-z]+:")
EXPLORABLE = re.compile(r'<div class="vcbx" data-vcbx="(\w+)"')
LEFT_OVER = re.compile(r"\$\$|(?<![\w.])@(?:eq|fig|tbl|sec)-|\[@|:::|\{#|#\||[\ue000\ue001]")
SOURCE_LINK = r'href="https://github.com/vcb-nb/vcb_nb/blob/main/vcb_nb/losses.py#L\d+"[^>]*>source'


class Reader(HTMLParser):
    "Ids, links, images and visible text of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.shown, self.silent = [], [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        if "id" in own: self.ids.append(own["id"])
        if tag == "a" and "href" in own: self.links.append(own["href"])
        if tag == "img": self.images.append(own.get("src", ""))
        self.silent += tag in ("pre", "code", "script", "style", "math")

    def handle_endtag(self, tag): self.silent -= tag in ("pre", "code", "script", "style", "math")

    def handle_data(self, data):
        if not self.silent: self.shown.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site: (folder, path of each page -> its text, what the tool reported)."
    for need in ("nbconvert", "latex2mathml", "nbdev"): pytest.importorskip(need)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", ROOT/"tools"/"site_preview.py", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.stdout.strip(), done.stderr[-3000:]
    pages = {p.relative_to(out).as_posix(): p.read_text("utf-8") for p in out.rglob("*.html")}
    return out, pages, done.stderr


def page_of(path):
    "The page that nbdev makes of a notebook: theory/06_losses.ipynb becomes theory/losses.html."
    relative = path.relative_to(NBS)
    return relative.with_name(re.sub(r"^\d+[a-z0-9]*_", "", relative.stem) + ".html").as_posix()


def test_site_builds_without_a_complaint(site):
    "Equations convert, references resolve, callouts close, and nbdev can make every page."
    assert site[2] == ""


def test_every_notebook_has_its_page(site): assert {page_of(p) for p in SOURCES} == set(site[1])


def test_links_and_anchors_lead_somewhere(site):
    _, pages, _ = site
    read = {path: Reader(text) for path, text in pages.items()}

    def leads(path, link):
        file, _, anchor = unquote(link).partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
        return target in read and (not anchor or anchor in read[target].ids)

    links = [(path, link) for path, page in read.items() for link in page.links]
    inside = [(path, link) for path, link in links if not ADDRESS.match(link)]
    broken = [f"{path}: {link}" for path, link in inside if not leads(path, link)]
    assert len(inside) > 1000 and not broken, "\n".join(broken)


def test_no_image_is_missing_or_fetched(site):
    out, pages, _ = site
    for path, text in pages.items():
        for source in Reader(text).images:
            is_there = source.startswith("data:") or (out/path).parent.joinpath(source).is_file()
            assert is_there, f"{path}: {source}"


def test_no_markup_is_left_in_the_text(site):
    for path, text in site[1].items():
        shown = " ".join(Reader(text).shown)
        left = LEFT_OVER.search(shown)
        assert not left, f"{path}: {shown[max(0, left.start() - 60):left.end() + 60]!r}"


def test_ids_are_unique_on_a_page(site):
    for path, text in site[1].items():
        ids = Reader(text).ids
        assert len(ids) == len(set(ids)), f"{path}: {sorted(i for i in ids if ids.count(i) > 1)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_explorables_reach_the_page(site, path):
    "As many on the page as the notebook's stored outputs hold."
    stored = json.loads(path.read_text("utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in stored for output in cell.get("outputs", [])]
    html = "".join("".join(data.get("text/html", "")) for data in outputs)
    assert sorted(EXPLORABLE.findall(site[1][page_of(path)])) == sorted(EXPLORABLE.findall(html))


def test_exported_functions_show_their_source_link(site):
    "nbdev's own API entries: signature, docments and a link to the line in the repository."
    page = site[1]["theory/losses.html"]
    assert re.search(SOURCE_LINK, page)
    assert 'id="vcb_loss"' in page and 'id="preference_loss"' in page


def test_equations_are_numbered_and_referred_to(site):
    page = site[1]["theory/losses.html"]
    assert re.search(r'id="eq-vcb"><math.*?\(\d+\)', page, re.S)
    assert re.search(r'href="#eq-vcb">Equation&nbsp;\d', page)


# The preview's own reading of Quarto's markdown

@pytest.mark.slow
def test_explorables_move_on_the_built_pages(site, tmp_path):
    "In a browser, on the pages as they are read: every control of every figure, by keyboard."
    from browser import chromium
    from test_explorables_browser import moved_by_keyboard
    out, pages, _ = site
    counts = {name: text.count('data-vcbx="') for name, text in pages.items()}
    moving = {name: count for name, count in counts.items() if count}
    assert sum(moving.values()) >= 4
    with chromium(tmp_path) as page:
        page.viewport(1200, 2000)
        for name, figures in moving.items():
            page.open((out/name).as_uri())
            page.wait(f"document.querySelectorAll('.vcbx[data-vcbx-ready]').length >= {figures}")
            for figure in range(figures): assert moved_by_keyboard(page, figure) > 0, name
        assert page.errors == []


@pytest.fixture(scope="module")
def new_page():
    pytest.importorskip("latex2mathml")
    module = tool("quarto_markdown")
    entries = module.read_bibliography(
        "@misc{mao2024,\n  author = {Mao, Xin and Li, Feng-Lin and Luu, Anh},\n"
        "  title = {Values},\n  year = {2024},\n  eprint = {2402.16030},\n}\n")
    return lambda: module.Page(entries)


def made(page, text): return page.finish(page.markdown_cell(text))


def test_references_may_come_before_their_equation(new_page):
    page = new_page()
    html = made(page, "By @eq-b and [-@eq-a].\n\n$$ x $$ {#eq-a}\n\n$$ y $$ {#eq-b}")
    assert 'href="#eq-b">Equation&nbsp;2</a>' in html and 'href="#eq-a">1</a>' in html
    assert html.count("<math") == 2 and not page.problems


def test_code_is_left_alone(new_page):
    page = new_page()
    html = made(page, "`$x$ @eq-none` and\n\n```\n$$ y $$\n::: {.callout-tip}\n[@nobody]\n```")
    assert "$x$ @eq-none" in html and "$$ y $$" in html and "::: {.callout-tip}" in html
    assert not page.problems


def test_callouts_fold_and_may_hold_code_cells_of_their_own(new_page):
    page = new_page()
    fence = '::: {.callout-tip collapse="true" title="Solution 1.1 with $x$"}'
    opened = page.markdown_cell(fence + "\n\nFirst.")
    html = page.finish(opened + "<pre>a cell</pre>" + page.markdown_cell("Then.\n:::"))
    assert re.search(r'<details class="callout tip">\s*<summary>Solution 1.1 with <math', html)
    assert html.index("a cell") < html.index("</details>") and not page.problems


def test_citations_give_a_list_and_unknown_ones_a_problem(new_page):
    page = new_page()
    html = made(page, "Known [@mao2024, section 3], and @mao2024; unknown [@nobody1999].")
    assert "Mao et al. 2024" in html and "2402.16030" in html
    assert html.count('<li id="ref-mao2024">') == 1
    assert page.problems == ["unknown citation nobody1999"]


@pytest.mark.parametrize("text, problem", [
    ("@fig-none", "no such label"), ("::: {.callout-note}\nopen", "not closed"),
    (":::", "closes nothing"), ("$$ x $$ {#eq-a}\n\n$$ y $$ {#eq-a}", "used twice"),
    (r"$\nosuchcommand$", "left over"), (r"$\frac{$", "cannot convert")])
def test_faults_are_named(new_page, text, problem):
    page = new_page()
    made(page, text)
    assert len(page.problems) == 1 and problem in page.problems[0]


def test_prices_are_no_maths(new_page):
    assert "<math" not in made(new_page(), "From $5 to $10, or \\$3.")


def test_tables_take_maths_with_bars_and_a_caption(new_page):
    page = new_page()
    table = "| a | b |\n|---|---|\n| $p(y|x)$ | 2 |\n\n: Two things {#tbl-two}\n\n"
    html = made(page, table + "See @tbl-two.")
    assert "Table 1: Two things" in html and "Table&nbsp;1" in html
    assert html.count("<td>") == 2 and "<math" in html


def test_headings_get_pandocs_ids(new_page):
    page = new_page()
    made(page, "## What does it ask for?\n\n## `vcb_loss` and $n = 2$\n\n## What does it ask for?")
    ids = [identity for _, identity, _ in page.headings]
    assert ids[0::2] == ["what-does-it-ask-for", "what-does-it-ask-for-1"]


# The tidying of notebooks

def cell(kind, source, **more):
    lines = source.splitlines(keepends=True)
    return {"cell_type": kind, "id": kind, "metadata": {}, "source": lines, **more}


def code(source): return cell("code", source, outputs=[{"x": 1}])


def test_tidy_splits_title_and_imports_and_then_rests():
    tidy = tool("tidy_cells").tidy
    title = cell("markdown", "# Title\n> Summary.\n\n[badge](x)\n")
    work = "#| hide\n#| label: fig-a\nimport a\nfrom b import (c,\n    d)\nx = c()\nimport e\nx"
    exported = "#| export\nimport os\ndef f(): return os.name"
    notebook = {"cells": [title, code(exported), code(work)]}
    cells = tidy(notebook)["cells"]
    text = ["".join(c["source"]) for c in cells]
    assert text[:2] == ["# Title\n> Summary.", "[badge](x)\n"] and text[2].startswith("#| export")
    assert text[3] == "#| hide\nimport a\nfrom b import (c,\n    d)\nimport e"
    assert text[4] == "#| hide\n#| label: fig-a\nx = c()\nx"
    assert cells[3]["outputs"] == [] and cells[4]["outputs"] == [{"x": 1}]
    assert len({c["id"] for c in cells}) == 5 and tidy(tidy(notebook)) == tidy(notebook)


def test_tidy_leaves_notebooks_without_exports_their_imports():
    notebook = {"cells": [code("import torch\nx = torch.ones(2)")]}
    assert tool("tidy_cells").tidy(notebook) == notebook


# The preview's own reading of cells

def test_html_outputs_pass_unchanged():
    "An explorable keeps its script, its braces and its dollars."
    pytest.importorskip("nbconvert")
    explorable = '<div class="vcbx">$x$ @eq-none</div><script>const a = `${1}`; // [@b]\n</script>'
    data = {"text/html": [explorable], "text/plain": ["x"]}
    output = {"output_type": "display_data", "data": data}
    assert tool("site_preview").output_html(None, output, "") == explorable


def test_code_options_do_what_they_say():
    pytest.importorskip("nbconvert")
    preview = tool("site_preview")
    shown = lambda source: preview.code_html(*reversed(preview.options({"source": source})))
    assert shown("#| echo: false\nx") == "" and "<details" not in shown("x = 1")
    folded = shown('#| code-fold: true\n#| code-summary: "Solution 1.1"\nx = 1')
    assert folded.startswith('<details class="fold"><summary>Solution 1.1</summary>')
