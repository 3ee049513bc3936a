"""Run notebooks where they lie and store their outputs: `python tools/execute.py NOTEBOOK ...`.

A cell with `#| eval: false`, which only Colab needs, is left alone and has no output."""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def skipped(cell)->bool: return cell.cell_type == "code" and "#| eval: false" in cell.source


def execute(path, folder=None, kernel="python3"):
    "The notebook with the outputs that its cells gave in `folder`, its own if not given."
    notebook = nbformat.read(path, 4)
    for cell in filter(skipped, notebook.cells): cell.update(outputs=[], execution_count=None)
    run = nbformat.from_dict({**notebook, "cells": []})
    run.cells = [cell for cell in notebook.cells if not skipped(cell)] # the same cells
    where = {"metadata": {"path": str(folder or Path(path).parent)}}
    NotebookClient(run, timeout=600, kernel_name=kernel, resources=where,
                   record_timing=False).execute()
    return notebook


if __name__ == "__main__":
    if not sys.argv[1:]: sys.exit("Name the notebooks to run: nbs/foundations/15_logprobs.ipynb")
    for path in sys.argv[1:]:
        nbformat.write(execute(path), path)
        print(path)
