"""How the site shows code.

Exported code: public names by nbdev's own API entries, internal ones by their source, as in the
notebook. nbdev's `rm_export` would hide both; pyproject.toml puts `ShowInternals` in its place.

Cells that JupyterLab shows collapsed are folded on the site, by the same metadata: `source_hidden`
folds code, `outputs_hidden` a whole solution. The tag `remove-input` shows an output alone."""
import ast, json, re

from fastcore.nbio import mk_cell
from nbdev.process import Processor

HIDDEN = {"export", "hide", "default_exp"}


def defined(source):
    "The functions and classes of a cell, constants apart."
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return [n.name for n in nodes]


def titles(cell):
    "The headings of a cell that are one word: a link to that name leads there."
    if cell.cell_type != "markdown": return []
    return [title.lower() for title in re.findall(r"^#+ (\w+)$", cell.source, re.MULTILINE)]


class ShowInternals(Processor):
    "Take exported code out of a page, except for internal definitions, which get an anchor."
    def begin(self):
        cells, known = [], {name for cell in self.nb.cells for name in titles(cell)}
        for cell in self.nb.cells:
            names = self.internals(cell)
            new = dict.fromkeys(name.lower() for name in names if name.lower() not in known)
            known |= {*new}
            anchors = "".join(f"[]{{#{name}}}" for name in new) # links lead there
            if anchors: cells.append(mk_cell(anchors, "markdown"))
            if names or not self.is_hidden(cell): cells.append(cell)
        for index, cell in enumerate(cells): cell.idx_ = index
        self.nb.cells = cells

    def is_hidden(self, cell):
        return cell.cell_type == "code" and {"exporti", *HIDDEN} & {*(cell.directives_ or ())}

    def internals(self, cell):
        if cell.cell_type != "code" or "exporti" not in (cell.directives_ or ()): return []
        return [] if "hide" in cell.directives_ else defined(cell.source)


def first_comment(cell):
    "What the code says of itself, as the name of its fold."
    line = cell.source.partition("\n")[0]
    return line.removeprefix("# ") if line.startswith("# ") else "Code"


def folded(cell):
    "The cells that the site shows in this one's place."
    hidden, tags = cell.metadata.get("jupyter", {}), cell.metadata.get("tags", [])
    if "remove-input" in tags: cell.source = f"#| echo: false\n{cell.source}"
    if not hidden.get("source_hidden"): return [cell]
    if hidden.get("outputs_hidden"):
        start = f'<details class="fold"><summary>{first_comment(cell)}</summary>'
        return [mk_cell(start, "markdown"), cell, mk_cell("</details>", "markdown")]
    summary = json.dumps(first_comment(cell), ensure_ascii=False)
    cell.source = f"#| code-fold: true\n#| code-summary: {summary}\n{cell.source}"
    return [cell]


class FoldHidden(Processor):
    "Fold on the site what is collapsed in the notebook."
    def end(self):
        self.nb.cells = [new for cell in self.nb.cells
                         for new in (folded(cell) if cell.cell_type == "code" else [cell])]
        for index, cell in enumerate(self.nb.cells): cell.idx_ = index
