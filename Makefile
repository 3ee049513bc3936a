# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo real test test-matrix test-real test-vllm test-study test-faults mutants export outputs docs site-preview clean

demo: $(READY)  ## the whole pipeline on the embedded world, ending in a report
	@$(BIN)/vcb run demo

real: $(READY)  ## a pretrained model (SmolLM2-135M), a few prompts and a reward function: under 15 minutes
	@$(BIN)/pip install --quiet --disable-pip-version-check gguf
	@$(BIN)/python tools/smollm2.py runs/smollm2
	@$(BIN)/vcb run recipes/real/recipe.yaml

test-real: $(READY)  ## the pages "Your model and your data" and "LoRA", and other people's data, with that model
	@$(BIN)/pip install --quiet --disable-pip-version-check gguf
	@$(BIN)/python tools/smollm2.py runs/smollm2
	VCB_REAL=1 $(BIN)/python -m pytest tests/test_real.py tests/test_notebooks.py -k "your_model or lora or scored"

test: $(READY)  ## every test and every notebook, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

test-matrix: $(READY)  ## every architecture of nbs/models.qmd through the stages, and every benchmark (four minutes)
	VCB_MATRIX=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_matrix.py tests/test_benchmarks.py

test-vllm: ## the sampling backend vLLM for real, on a CPU, in an environment of its own (ten minutes)
	$(PYTHON) tools/vllm_env.py .venv-vllm
	.venv-vllm/bin/python -m pytest -p no:cacheprovider tests/test_vllm.py

test-study: $(READY)  ## a study killed in every way, and the notebook of studies (ten minutes)
	VCB_STUDY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_study.py \
		tests/test_rounds.py tests/test_notebooks.py -k "study or kill_in_round or 12_online"

test-faults: $(READY)  ## kill every stage twenty times and compare with an undisturbed run
	$(BIN)/python tests/faults.py 20

mutants: $(READY)  ## insert bugs, one at a time: the tests must catch each (five minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

export: $(READY)  ## after editing notebooks: library and clean notebooks
	$(BIN)/nbdev-export && $(BIN)/python tools/strip_widgets.py && $(BIN)/nbdev-clean && $(BIN)/python tools/readme.py

outputs: $(READY)  ## run a notebook and store its outputs: make outputs NB=nbs/theory/06_losses.ipynb
	$(BIN)/python tools/execute.py $(NB) && $(MAKE) export

docs: $(READY)  ## the documentation site (needs Quarto)
	@command -v quarto >/dev/null || { echo "The site needs Quarto: https://quarto.org/docs/get-started/"; exit 1; }
	PYTHONPATH=. $(BIN)/nbdev-docs

site-preview: $(READY)  ## the same pages, without Quarto and without a network, in _preview/
	@$(BIN)/python tools/site_preview.py _preview

clean:
	rm -rf $(VENV) runs _docs _proc _preview build dist *.egg-info

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Installed in $(VENV)."
