# make demo: convert the embedded teacher; make test, make check: what CI runs. The first call builds .venv.
# On a machine without a GPU, TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu" avoids the CUDA wheels.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check lint-fix docs golden install clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/linearize convert --model demo --recipe lolcats -o runs/demo --resume

test: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/build.py
	$(BIN)/python docs/build_mixers.py

# Measures the loss curves anew that the tests compare with; look at the difference before you commit it.
golden: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/stages/curves.py

install: $(STAMP)

# The stamp is touched last, so an interrupted installation is repeated. torch first: chosen by TORCH and TORCH_FLAGS alone.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_FLAGS) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
