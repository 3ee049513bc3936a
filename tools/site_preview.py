"""Build the pages without Quarto and without a network: `python tools/site_preview.py [FOLDER]`.

nbdev makes the pages' notebooks (API entries with source links, hidden cells gone), as it does for
Quarto; what Quarto would then do is done here in little. `make docs` builds the real site."""
import base64, html, json, os, posixpath, re, shutil, sys, tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import yaml
from jinja2 import Template
from nbconvert.filters import ansi2html

from quarto_markdown import Page, colour_code, read_bibliography
from tidy_cells import notebooks, tidy

SITE = "https://vcb-nb.github.io/vcb_nb/"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
OPTION = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*)\n?", re.M)
LINK = re.compile(r'(<(?:a|img)\b[^>]*?\b(?:href|src)=")([^"]+)(")')


@dataclass
class Source:
    "A page before it is made."
    path: str                    # relative to nbs/, e.g. theory/06_losses.ipynb
    cells: list
    title: str = ""
    summary: str = ""
    problems: list = field(default_factory=list)

    @property
    def output(self):
        "As nbdev names its pages: theory/losses.html."
        folder, name = posixpath.split(self.path.lower())
        stem = re.sub(r"^\d+[a-z0-9]*_", "", posixpath.splitext(name)[0])
        return posixpath.join(folder, stem + ".html")


def not_source(folder, names):
    "What notebooks leave beside themselves."
    left = {"__pycache__", ".ipynb_checkpoints"}
    if Path(folder) != ROOT/"nbs": left.add("runs")
    return left.intersection(names)


def copy_project(work):
    "What nbdev needs, in a folder of its own: the working tree stays as it is."
    for name in ("nbs", "vcb_nb"): shutil.copytree(ROOT/name, work/name, ignore=not_source)
    shutil.copy(ROOT/"pyproject.toml", work)
    for path in notebooks(work/"nbs"):
        path.write_text(json.dumps(tidy(json.loads(path.read_text("utf-8")))), "utf-8")


def index_symbols():
    "Which page and which file each exported name is in, as `nbdev-docs` begins."
    from nbdev.doclinks import _build_modidx
    _build_modidx()
    os.environ["IN_TEST"] = "1"  # as nbdev does while it runs cells


def nbdev_cells(path):
    "The cells of one notebook after nbdev's processing, the front matter first."
    from fastcore.nbio import read_nb
    from nbdev.processors import FilterDefaults
    notebook = read_nb(path)
    FilterDefaults()(notebook)
    return json.loads(json.dumps(notebook.cells, default=dict))


def front_matter(text):
    "YAML between `---` lines, and what follows."
    found = re.match(r"\s*---\n(.*?)\n---\s*", text, re.S)
    return (yaml.safe_load(found[1]), text[found.end():]) if found else ({}, text)


def cell_source(cell): return "".join(cell["source"])


def read_notebook(path, name):
    "A notebook as nbdev makes its page; where nbdev fails, as it stands, with the fault named."
    problems = []
    try: cells = nbdev_cells(path)
    except Exception as error:
        problems.append(f"nbdev-docs would stop here: {error}")
        cells = json.loads(path.read_text("utf-8"))["cells"]
    raw = [cell_source(c) for c in cells if c["cell_type"] == "raw"]
    meta = front_matter(raw[0])[0] if raw else {}
    shown = [c for c in cells if c["cell_type"] != "raw"]
    return Source(name, shown, meta.get("title", name), meta.get("description", ""), problems)


def read_qmd(path, name):
    meta, body = front_matter(path.read_text("utf-8"))
    cells = [{"cell_type": "markdown", "source": body}]
    return Source(name, cells, meta["title"], meta.get("description", ""))


def read_sources(nbs):
    "Every notebook and `.qmd` page below `nbs`, by path."
    sources = {}
    for path in [*notebooks(nbs), *sorted(nbs.glob("*.qmd"))]:
        name = path.relative_to(nbs).as_posix()
        sources[name] = (read_qmd if path.suffix == ".qmd" else read_notebook)(path, name)
    return sources


def options(cell):
    "Quarto's `#|` options of a code cell, and the code without them."
    text = cell_source(cell)
    found = {m[1]: yaml.safe_load(m[2]) if m[2] else True for m in OPTION.finditer(text)}
    return found, OPTION.sub("", text).strip("\n")


def preformatted(text): return f'<pre class="output">{ansi2html(text)}</pre>'


def output_html(page, output, alt):
    "One stored output as HTML; HTML outputs, such as explorables, pass unchanged."
    if output["output_type"] == "stream": return preformatted("".join(output["text"]))
    if output["output_type"] == "error": return preformatted(output["evalue"])
    data = {kind: "".join(v) for kind, v in output["data"].items() if not kind.endswith("json")}
    if "text/html" in data: return data["text/html"]
    if "text/markdown" in data: return page.markdown_cell(data["text/markdown"])
    if "image/svg+xml" in data: return data["image/svg+xml"]
    if "image/png" in data:
        picture = base64.b64encode(base64.b64decode(data["image/png"])).decode()
        return f'<img src="data:image/png;base64,{picture}" alt="{html.escape(alt, quote=True)}">'
    return preformatted(data.get("text/plain", ""))


def outputs_html(page, cell, own):
    alt = str(own.get("fig-alt", ""))
    made = "\n".join(output_html(page, output, alt) for output in cell.get("outputs", []))
    if not made.strip() or own.get("output") is False: return ""
    if own.get("fig-cap"): return page.figure(str(own.get("label", "")), made, str(own["fig-cap"]))
    return f'<div class="result">{made}</div>'


def code_html(code, own):
    if not code or own.get("echo") is False: return ""
    shown = colour_code(code)
    if "code-fold" not in own or own["code-fold"] is False: return shown
    is_open = " open" if own["code-fold"] == "show" else ""
    summary = own.get("code-summary", "Code")
    return f'<details class="fold"{is_open}><summary>{summary}</summary>{shown}</details>'


def cell_html(page, cell):
    if cell["cell_type"] == "markdown": return page.markdown_cell(cell_source(cell))
    own, code = options(cell)
    if own.get("include") is False: return ""
    return f'<div class="cell">{code_html(code, own)}{outputs_html(page, cell, own)}</div>'


def entries(contents):
    "Pages of a sidebar in reading order."
    for item in contents:
        item = {"href": item} if isinstance(item, str) else item
        if "href" in item: yield item["href"]
        yield from entries(item.get("contents", []))


def sidebar_html(contents, sources, here):
    made = []
    for item in contents:
        item = {"href": item} if isinstance(item, str) else item
        if "contents" in item:
            inside = sidebar_html(item["contents"], sources, here)
            made.append(f'<li class="section">{item["section"]}<ul>{inside}</ul></li>')
        elif item["href"] in sources:
            source = sources[item["href"]]
            mark = ' aria-current="page"' if source is here else ""
            text = item.get("text", source.title)
            made.append(f'<li><a href="{relative(source.output, here)}"{mark}>{text}</a></li>')
    return "\n".join(made)


def relative(target, here):
    "The address of a page as seen from another."
    return posixpath.relpath(target, posixpath.dirname(here.output) or ".")


def rewrite(address, here, sources):
    "Links to notebooks become links to pages; links to our own site stay here."
    if address == BADGE: return relative("colab-badge.svg", here)
    if address.startswith(SITE): return relative(address[len(SITE):] or "index.html", here)
    path, mark, anchor = address.partition("#")
    if not path.endswith((".ipynb", ".qmd")) or "://" in path: return address
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here.path), path))
    if target not in sources: return address
    return relative(sources[target].output, here) + mark + anchor


def contents_html(page):
    "The page's own table of contents: headings of the second level."
    plain = lambda text: re.sub("<a [^>]*>|</a>", "", text)
    second = [(identity, plain(text)) for level, identity, text in page.headings if level == 2]
    items = [f'<li><a href="#{identity}">{text}</a></li>' for identity, text in second]
    return page.restore("\n".join(items))


def neighbours(source, sources, sidebar):
    "The pages before and after, in the sidebar's order."
    order = [name for name in entries(sidebar) if name in sources]
    if source.path not in order: return {}
    place = order.index(source.path)
    around = {"previous": order[:place][-1:], "next": order[place + 1:place + 2]}
    link = lambda other: {"title": other.title, "href": relative(other.output, source)}
    return {where: link(sources[found[0]]) for where, found in around.items() if found}


def page_html(source, sources, sidebar, bibliography, template):
    "One page. What could not be resolved is left in `source.problems`."
    page = Page(bibliography)
    title, summary = page.inline(source.title), page.inline(source.summary)
    body = page.finish("\n".join(cell_html(page, cell) for cell in source.cells))
    source.problems += page.problems
    made = template.render(
        title=title, name=source.title, summary=summary, body=body, toc=contents_html(page),
        home=relative("index.html", source), sidebar=sidebar_html(sidebar, sources, source),
        **neighbours(source, sources, sidebar))
    return LINK.sub(lambda m: m[1] + rewrite(m[2], source, sources) + m[3], made)


def build(out):
    "Build all pages into `out`; return the sources with what went wrong on each."
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        copy_project(work)
        os.chdir(work)  # nbdev finds its settings from here
        sys.path.insert(0, str(work))
        index_symbols()
        sources = read_sources(work/"nbs")
        os.chdir(ROOT)
    nbs = ROOT/"nbs"
    settings = yaml.safe_load((nbs/"sidebar.yml").read_text("utf-8"))
    sidebar = settings["website"]["sidebar"]["contents"]
    bibliography = read_bibliography((nbs/"references.bib").read_text("utf-8"))
    template = Template((ROOT/"tools"/"site_preview.html").read_text("utf-8"))
    for source in sources.values():
        target = out/source.output
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page_html(source, sources, sidebar, bibliography, template), "utf-8")
    for images in nbs.rglob("images"):
        shutil.copytree(images, out/images.relative_to(nbs), dirs_exist_ok=True)
    shutil.copy(ROOT/"tools"/"colab-badge.svg", out)
    return sources


def main(folder="_preview"):
    out = Path(folder).resolve()
    shutil.rmtree(out, ignore_errors=True)
    sources = build(out)
    for source in sources.values():
        for problem in source.problems: print(f"nbs/{source.path}: {problem}", file=sys.stderr)
    print(f"{len(sources)} pages: open {out/'index.html'}")
    return int(any(s.problems for s in sources.values()))


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
