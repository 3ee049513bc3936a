"""How the site shows exported code: public names by nbdev's own API entries, internal ones by their
source, as in the notebook. nbdev's `rm_export` would hide both; pyproject.toml puts this in its
place."""
import ast
import re

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
