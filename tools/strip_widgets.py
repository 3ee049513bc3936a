"""Take progress bars and saved widget state out of the notebooks: `python tools/strip_widgets.py`.

A static page would show frozen bars, and saved state makes it load scripts from elsewhere."""
import json
from pathlib import Path

WIDGET = "application/vnd.jupyter.widget-view+json"


def strip(notebook):
    "The notebook (a dict) without widget outputs and widget state."
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if WIDGET not in o.get("data", {})]
    return notebook


if __name__ == "__main__":
    for path in (Path(__file__).parent.parent/"nbs").rglob("*.ipynb"):
        before = path.read_text("utf-8")
        after = json.dumps(strip(json.loads(before)), indent=1, ensure_ascii=False,
                           sort_keys=True) + "\n"
        if after != before: path.write_text(after, "utf-8")
