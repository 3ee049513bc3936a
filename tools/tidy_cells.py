"""Bring notebooks into the form that nbdev's pages need: `python tools/tidy_cells.py`.

nbdev makes the title cell the page's header and drops what else that cell holds; and when it builds
the pages it runs every cell that imports, though not the cells before it. So the title stands alone
with its summary, and imports stand alone in notebooks whose pages show exported code."""
import ast, hashlib, json, re
from pathlib import Path

NBS = Path(__file__).parent.parent/"nbs"
TITLE = re.compile(r"\A\s*(# [^\n]+\n\s*> [^\n]+)\n+(?=\S)")
KEEPS_WHOLE = re.compile(r"^#\|\s*(export|exporti|exports|eval:\s*false)\b", re.M)
EXPORTS = re.compile(r"^#\|\s*exports?\s*$", re.M)
FIGURE_OPTION = re.compile(r"#\|\s*(label|fig-|tbl-)")


def source(cell): return "".join(cell["source"])


def part(cell, text, **changes):
    "A cell like `cell` that holds `text`, with an id made from it."
    identity = hashlib.sha1((cell.get("id", "") + text).encode()).hexdigest()[:8]
    return {**cell, "id": identity, "source": text.splitlines(keepends=True), **changes}


def split_title(cell):
    "`# Title` and `> summary` in one cell, whatever follows them in the next."
    found = TITLE.match(source(cell))
    if cell["cell_type"] != "markdown" or not found: return [cell]
    rest = source(cell)[found.end():]
    return [part(cell, found[1]), part(cell, rest)]


def import_lines(text):
    "Line numbers (from 0) of imports and what stands above them; none in a cell that only imports."
    try: body = ast.parse(text).body
    except SyntaxError: return set()  # a magic
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if not imports or len(imports) == len(body): return set()
    leading = range(imports[0].lineno - 1) if imports[0] is body[0] else ()
    return {*leading, *(n - 1 for node in imports for n in range(node.lineno, node.end_lineno + 1))}


def split_imports(cell):
    "Imports in one cell, the work they serve in the next; hidden stays hidden."
    text = source(cell)
    if cell["cell_type"] != "code" or KEEPS_WHOLE.search(text): return [cell]
    lines, moved = text.splitlines(), import_lines(text)
    if not moved: return [cell]
    options = [line for line in lines if line.startswith("#|")]
    imports = [lines[n] for n in sorted(moved) if not lines[n].startswith("#|")]
    above = [line for line in options if not FIGURE_OPTION.match(line)]
    rest = [line for n, line in enumerate(lines) if n not in moved and not line.startswith("#|")]
    work = "\n".join([*options, "\n".join(rest).strip("\n")])
    return [part(cell, "\n".join([*above, *imports]).strip("\n"), outputs=[]), part(cell, work)]


def tidy(notebook):
    "The notebook (a dict) with its title alone, and imports alone where its page shows exports."
    cells, titled = [], False
    for cell in notebook["cells"]:
        parts = [cell] if titled else split_title(cell)
        if cell["cell_type"] == "markdown" and source(cell).lstrip().startswith("# "): titled = True
        cells += parts
    if any(c["cell_type"] == "code" and EXPORTS.search(source(c)) for c in cells):
        cells = [p for cell in cells for p in split_imports(cell)]
    return {**notebook, "cells": cells}


def notebooks(root=NBS):
    "Every notebook of the site: the index, and those one folder down."
    paths = [*Path(root).glob("*.ipynb"), *Path(root).glob("*/*.ipynb")]
    hidden = lambda path: any(part[0] in "._" for part in path.relative_to(root).parts)
    return sorted(path for path in paths if not hidden(path))


if __name__ == "__main__":
    for path in notebooks():
        before = json.loads(path.read_text("utf-8"))
        after = tidy(before)
        if after == before: continue
        text = json.dumps(after, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        path.write_text(text, "utf-8")
