# `make` lists the targets. Each installs what it needs into .venv, once.
#
# TORCH is what pip is asked to install as torch, options of pip included. For a CUDA build, with PyTorch's index for it in
# pip's configuration or behind an --index-url, say:
#   make demo TORCH="torch==2.13.0+cu130"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(firstword $(shell echo '$(TORCH)' | cksum))
TEST_ENV  := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
# parity.py runs in an environment of its own
BENCHES := $(filter-out recipes/bench/parity.py,$(wildcard recipes/bench/*.py))

.PHONY: help demo test test-true-size quality style bench $(BENCHES) test-min clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## the whole method in a small world: reward model, reinforcement learning, an exact judge, a report
	$(BIN)/python -m trl_spatial demo $(DEMO_ARGS)

test: $(INSTALLED) ## run the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-true-size: $(INSTALLED) ## count what every recipe takes at true size, on fake tensors
	$(TEST_ENV) $(BIN)/python -m pytest tests/true_size -m "true_size or not true_size" $(PYTEST_ARGS)

quality: $(INSTALLED) ## check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED) ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCHES) ## measure the numbers of recipes/bench/README.md

# a rule for each, without a shell between, so that ending make ends the measurement
$(BENCHES): $(INSTALLED)
	$(BIN)/python $@

test-min: $(INSTALLED) ## run the tests with the lowest versions that pyproject.toml allows
	rm -rf .venv-min && $(PYTHON) -m venv .venv-min
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python .venv-min/bin/python \
		--extra dev --extra data --extra demo --extra diffusion --extra evaluate --extra judge --extra quant --extra ray --extra serve --extra space --output-file .venv-min/requirements.txt pyproject.toml
	$(BIN)/uv pip install --python .venv-min/bin/python --requirement .venv-min/requirements.txt
	$(BIN)/uv pip install --python .venv-min/bin/python --no-deps --editable .
	$(TEST_ENV) .venv-min/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

clean: ## remove the environments and caches
	rm -rf $(VENV) .venv-min .mypy_cache .pytest_cache .ruff_cache dist

# torch first and by itself: with it there, the requirement of pyproject.toml is met whatever its build
$(INSTALLED): pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --constraint .ci/constraints.txt --editable '.[dev,data,demo,diffusion,evaluate,judge,quant,ray,serve,space]'
	touch $@
