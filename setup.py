"Packaging metadata comes from settings.ini, so that there is one place to change it."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=["="])
cfg.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
init = (Path(__file__).parent / cfg["lib_path"] / "__init__.py").read_text("utf-8")
version = re.search(r'__version__ = "(.+?)"', init)[1]

setup(
    version=version,
    description=cfg["description"],
    long_description=(Path(__file__).parent / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split()
                    for extra in ("dev", "vllm", "quantization", "judge")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": ["vcb_nb = vcb_nb._modidx:d"]},  # names in backticks link to their pages
)
