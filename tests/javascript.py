"What the tests of moving figures share: JavaScript run by node, and numbers held to torch's."
import json, shutil, subprocess
from pathlib import Path

import pytest, torch

from vcb_nb import explorables

JS = Path(explorables.__file__).parent/"js"


def node(expression, figures, **values):
    "The value of a JavaScript expression over `VCBX` and `values`, with these figures loaded."
    binary = shutil.which("node") or pytest.skip("needs node on the PATH")
    code = "".join((JS/f"{name}.js").read_text("utf-8") for name in ("core", *figures))
    code += "".join(f"const {k} = {json.dumps(v)};" for k, v in values.items())
    code += f"process.stdout.write(JSON.stringify({expression}));"
    return json.loads(subprocess.run([binary, "-"], input=code, text=True, capture_output=True,
                                     check=True).stdout)


def close(got, wanted, tolerance=1e-9):
    "Both as float64."
    got, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (got, wanted))
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
