"""Write README.md from nbs/index.ipynb: `python tools/readme.py`.
(nbdev's own command needs Quarto.)"""
import json, re
from pathlib import Path

from nbdev.config import nbpath2html

ROOT = Path(__file__).parent.parent
SITE = "https://vcb-nb.github.io/vcb_nb"


def output_text(cell):
    "The plain text of a code cell's last result."
    texts = ["".join(o["data"].get("text/plain", "")) for o in cell["outputs"] if "data" in o]
    return f"\n\n```\n{texts[-1]}\n```" if texts else ""


def cell_markdown(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "code": return f"```python\n{source}\n```" + output_text(cell)
    source = source.replace("](images/", "](nbs/images/")
    page = lambda m: f"]({SITE}/{nbpath2html(m[1]).as_posix()})"
    return re.sub(r"\]\(([\w/]+\.(?:ipynb|qmd))\)", page, source)


def readme():
    "The README as text. What is hidden, or moves only on the page, stays out."
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text("utf-8"))["cells"]
    shown = [c for c in cells if not "".join(c["source"]).startswith("#| hide")
             and "remove-input" not in c["metadata"].get("tags", [])]
    return "\n\n".join(map(cell_markdown, shown)) + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), "utf-8")
