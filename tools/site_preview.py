"""Build the pages without Quarto and without a network: `python tools/site_preview.py [FOLDER]`.

nbdev makes the pages' notebooks, as it does for Quarto: API entries with source links, hidden cells
gone. pandoc, which Quarto is built on, makes HTML of them. `make docs` builds the real site."""
import html, json, os, re, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nbdev imports the library to show its functions

import pypandoc, yaml
from nbdev.config import nbpath2html
from nbdev.serve import proc_nbs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

SITE = "https://vcb-nb.github.io/vcb_nb/"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
ADDRESS = re.compile(r'(<(?:a|img)\b[^>]*?\b(?:href|src)=")([^"]+)')
CODE = re.compile(r'<pre\s+class="(python|bash|sh|yaml|json)"><code>(.*?)</code></pre>', re.S)
FENCE = "`" * 12
PREVIEW = ROOT/"tools"/"site_preview"
PANDOC = pypandoc.get_pandoc_path()
OPTIONS = ["--from=markdown", "--to=html5", "--standalone", "--mathml", "--columns=9999",
           "--syntax-highlighting=none", "--toc", "--toc-depth=2", f"--template={PREVIEW}.html",
           f"--lua-filter={PREVIEW}.lua"]


def output_markdown(output):
    "One stored output as Markdown; HTML outputs, such as explorables, pass unchanged."
    data = output.get("data") or {"text/plain": output.get("text", "")}
    data = {kind: "".join(text) for kind, text in data.items()}
    if "text/markdown" in data: return data["text/markdown"]
    if "image/png" in data:
        picture = "".join(data["image/png"].split())
        data["text/html"] = f'<img src="data:image/png;base64,{picture}">'
    if "text/html" in data: return f"{FENCE} {{=html}}\n{data['text/html']}\n{FENCE}"
    return f"{FENCE} {{.output}}\n{data['text/plain']}\n{FENCE}"


def code_markdown(code, options):
    "The code of a cell, folded where it says so."
    if not code or options.get("echo") is False: return ""
    shown = f"{FENCE} python\n{code}\n{FENCE}"
    if not options.get("code-fold"): return shown
    mark = " open" if options["code-fold"] == "show" else ""
    summary = f"<summary>{options.get('code-summary', 'Code')}</summary>"
    return f'<details class="fold"{mark}>{summary}\n\n{shown}\n\n</details>'


def cell_markdown(cell):
    "A cell as Quarto hands it to pandoc: code in a fence, then its outputs."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code": return source
    lines = source.splitlines()
    options = yaml.safe_load("\n".join(x[2:] for x in lines if x.startswith("#|"))) or {}
    code = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
    made = [*map(output_markdown, cell["outputs"])]
    if made: made = ["::: result", *made, ":::"]
    return "\n\n".join([code_markdown(code, options), *made])


def page_markdown(path):
    "A page as Markdown with its front matter, which nbdev puts into a notebook's first cell."
    text = path.read_text("utf-8")
    if path.suffix == ".qmd": return text
    return "\n\n".join(map(cell_markdown, json.loads(text)["cells"]))


def read_sources(work):
    "Each page's Markdown by its path below nbs/, after nbdev's processing in the folder `work`."
    runs = lambda folder, names: {"runs"} & {*names} if Path(folder) != ROOT/"nbs" else ()
    shutil.copytree(ROOT/"nbs", work/"nbs", ignore=runs)  # what notebooks leave beside themselves
    shutil.copy(ROOT/"pyproject.toml", work)
    os.chdir(work)
    made = proc_nbs(n_workers=0)
    os.chdir(ROOT)
    paths = [*made.rglob("*.ipynb"), *made.rglob("*.qmd")]
    return {path.relative_to(made).as_posix(): page_markdown(path) for path in sorted(paths)}


def with_titles(contents, sources, here):
    "The sidebar's entries, each with its title; the page `here` is marked."
    for item in contents:
        item = {"href": item} if isinstance(item, str) else item
        if "contents" in item:
            yield {**item, "contents": [*with_titles(item["contents"], sources, here)]}
        else:
            title = yaml.safe_load(sources[item["href"]].split("---")[1])["title"]
            yield {"text": title, "here": item["href"] == here, **item}


def sidebar_html(entries, root):
    "The sidebar as nested lists of links."
    def item(e):
        if "contents" in e:
            inner = sidebar_html(e["contents"], root)
            return f'<li class="section">{e["section"]}<ul>{inner}</ul></li>'
        here = ' aria-current="page"' if e["here"] else ""
        return f'<li><a href="{root}{e["href"]}"{here}>{html.escape(e["text"])}</a></li>'
    return "\n".join(map(item, entries))


def pages_of(entries):
    "The pages of a sidebar in reading order, whatever sections hold them."
    return [page for e in entries for page in (pages_of(e["contents"]) if "contents" in e else [e])]


def around(name, sources):
    "What stands around a page: its sidebar, and the pages before and after in the same order."
    settings = yaml.safe_load((ROOT/"nbs"/"sidebar.yml").read_text("utf-8"))
    entries = [*with_titles(settings["website"]["sidebar"]["contents"], sources, name)]
    order = pages_of(entries)
    place = next((k for k, page in enumerate(order) if page["here"]), len(order) + 1)  # 404
    root = "../" * name.count("/")
    return {"root": root, "sidebar": sidebar_html(entries, root),
            "previous": order[place - 1:place], "next": order[place + 1:place + 2]}


def rewrite(link, root):
    "Links to notebooks become links to pages; links to our own site stay in the preview."
    if link == BADGE: return f"{root}colab-badge.svg"
    if link.startswith(SITE): return root + (link[len(SITE):] or "index.html")
    path, mark, anchor = link.partition("#")
    if "://" in link or not path.endswith((".ipynb", ".qmd")): return link
    return nbpath2html(path).as_posix() + mark + anchor


def coloured(m):
    "Code in colour. Pygments does it: pandoc would take half a second a page to learn Python."
    return highlight(html.unescape(m[2]), get_lexer_by_name(m[1]), HtmlFormatter())


def convert(text, **variables):
    "A page's Markdown as HTML, and what pandoc complains of."
    with tempfile.TemporaryDirectory() as folder:
        defaults = Path(folder)/"defaults.json"
        defaults.write_text(json.dumps({"variables": variables}), "utf-8")
        done = subprocess.run([PANDOC, f"--defaults={defaults}", *OPTIONS], input=text,
                              capture_output=True, encoding="utf-8")
    root, page = variables.get("root", ""), CODE.sub(coloured, done.stdout)
    return ADDRESS.sub(lambda m: m[1] + rewrite(m[2], root), page), done.stderr.strip()


def main(folder="_preview"):
    out = Path(folder).resolve()
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work: sources = read_sources(Path(work).resolve())
    for images in (ROOT/"nbs").rglob("images"):
        shutil.copytree(images, out/images.relative_to(ROOT/"nbs"))
    shutil.copy(ROOT/"tools"/"colab-badge.svg", out)
    make = lambda name: convert(sources[name], **around(name, sources))
    with ThreadPoolExecutor(os.cpu_count()) as pool: made = [*pool.map(make, sources)]
    for name, (page, complaints) in zip(sources, made):
        target = out/nbpath2html(name)
        target.parent.mkdir(exist_ok=True)
        target.write_text(page, "utf-8")
        if complaints: print(f"nbs/{name}: {complaints}", file=sys.stderr)
    print(f"{len(made)} pages: open {out/'index.html'}")
    return int(any(complaints for _, complaints in made))


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
