# Every target sets up what it needs. `make` alone prints them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Tests that need no more than what is set up here.
EVERYWHERE := not browser and not gpu
# The tests of a file stay in one process: they share what is slow to start.
PYTEST := $(PY) -m pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup build lint format test unit browser demo up down clean sanitize triton lock

help: ## print the targets
	@grep -hE '^[a-z0-9%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-24s %s\n", $$1, $$2}'

$(STAMP): requirements.lock infra/bootstrap.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" bash infra/bootstrap.sh

setup: $(STAMP) build ## create .venv, install the locked dependencies, build csrc

build: $(STAMP) ## build the C++ extension (only what changed)
	@$(MAKE) --no-print-directory -j$(shell nproc) -C csrc PYTHON="$(CURDIR)/$(PY)"

lint: setup ## ruff (with the Airflow rules), format check, mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy components dags infra model spark_jobs tests

format: $(STAMP) ## apply ruff's fixes and format
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

test: lint ## lint, unit, integration and a short end-to-end run of the whole loop (WORKERS=2 processes)
	@$(PYTEST) -m "$(EVERYWHERE)"

unit: setup ## the quick tests alone
	@$(PYTEST) -m "$(EVERYWHERE) and not integration and not end_to_end"

browser: setup ## look at the UIs of a running demo with headless Chromium; writes docs/images
	@command -v chromium >/dev/null || apt-get install -y -qq chromium || \
	  { echo "error: run: sudo apt-get install -y chromium" >&2; exit 1; }
	@$(VENV)/bin/uv pip install -q -p $(VENV) -r infra/browser-requirements.txt
	@$(PY) -m pytest -m browser tests/browser

triton: setup ## test the GPU kernels: on a CUDA device, or in Triton's interpreter (installs triton)
	@$(PY) -c "import triton" 2>/dev/null || $(VENV)/bin/uv pip install -q -p $(VENV) -r infra/triton-requirements.txt
	@$(PY) -m pytest tests/model/test_attention_triton.py tests/model/test_attention_triton_promises.py

sanitize: setup ## the C++ tests under ASan with UBSan, and under TSan
	@$(MAKE) --no-print-directory -C csrc asan tsan PYTHON="$(CURDIR)/$(PY)"

demo: setup ## the whole loop on a synthetic world, or on DATA=path/to/KuaiRand-Pure
	@$(PY) -m infra.local.demo $(if $(DATA),--data "$(DATA)")

up: setup ## start MLflow, Spark, Airflow and the server; they stay up
	@$(PY) -m infra.local.up

down: ## stop what `make up` or `make demo` started
	@if [ -x $(PY) ]; then $(PY) -m infra.local.down; fi

bench-kuairand: setup ## HSTU ranker against the item-user rate baselines (DATA=path/to/KuaiRand-Pure)
	@$(PY) -m model.experiments.kuairand --threads=1 --data "$(or $(DATA),../shared/data/KuaiRand-Pure)" $(ARGS)

bench-table: setup ## the embedding table beside its peers (installs libcuckoo-dev and libabsl-dev; ARGS="--sections lookup")
	@$(PY) -m model.experiments.bench_table $(if $(QUICK),--quick) $(ARGS)

bench-collisions: setup ## what id collisions cost, and what admission and expiry save (DATA=path/to/ml-1m)
	@$(PY) -m model.experiments.collisions --data "$(or $(DATA),../shared/data/ml-1m)" $(ARGS)

bench-hstu: setup ## training steps, attention and ranking beside PyTorch (DATA=path/to/ml-1m, or ARGS="--epochs 0")
	@$(PY) -m model.experiments.bench_hstu --data "$(or $(DATA),../shared/data/ml-1m)" $(ARGS)

bench-attention-cuda: setup ## the Triton attention beside PyTorch, eager and compiled (needs a CUDA device)
	@$(PY) -m model.experiments.bench_attention_cuda $(ARGS)

bench-ml1m: setup ## next item on MovieLens, HSTU and SASRec; hours (DATA=path/to/ml-1m, ARGS="--only hstu --threads 1")
	@$(PY) -m model.experiments.ml1m --data "$(or $(DATA),../shared/data/ml-1m)" $(ARGS)

bench-streaming: setup ## the paper's synthetic stream with a growing vocabulary (ARGS="--only hstu")
	@$(PY) -m model.experiments.streaming $(ARGS)

bench-stochastic-length: setup ## sparsity against loss of quality (DATA=path/to/ml-1m)
	@$(PY) -m model.experiments.stochastic_length_bench --data "$(or $(DATA),../shared/data/ml-1m)" $(ARGS)

# From requirements.in alone: .venv may hold what `make browser` and `make triton` added. torch brings its own GPU libraries.
lock: $(STAMP) ## resolve requirements.in again, keeping the versions that fit (ARGS=--upgrade: take the newest)
	@$(VENV)/bin/uv pip compile -q -p $(PY) --no-header --no-annotate $(ARGS) requirements.in -o requirements.lock >/dev/null
	@sed -i -E '/^((cuda|nvidia)-|(setuptools|triton)==)/d' requirements.lock

clean: down ## remove what was built and everything the demo wrote; keeps .venv and what `make up` holds
	@rm -rf .freshet/demo csrc/build model/_native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
