# Every target sets up what it needs from nothing, inside .venv; nothing global is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
CLIENTS_JS := tests/clients/js
CONSOLE_JS := tests/console/js
ARGS ?=
N ?= 20
PACKAGES := baton router prefill_node decode_node node engine kvtransfer tuner kernels wire telemetry

.PHONY: serve test clients browser soak lint bench-api bench-serve bench-kv-layout bench-transfer bench-curve bench-digest bench-transfer-dtype bench-weight-dtype bench-engine bench-structured bench-speculation gpu-check bench-gpu bench-goodput validate-simulator bench-simulator example-plan tuner-timeline clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# torch goes first and pinned: a bare "torch" would bring several GB of CUDA packages.
$(VENV)/.run: pyproject.toml constraints.txt kernels/cpu_ops.cpp kernels/cpu_ops.inc kernels/cpu_linear.inc
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	$(BIN)/python -m compileall -q $(PACKAGES)  # pip compiles what it copies; these it only links
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,bench]"
	touch $@

# Clients that need another major of openai than .venv has. Where they cannot be installed, their tests
# are skipped and say so; the next run tries again.
$(CLIENTS)/.done: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q --no-deps -r $< && touch $@ || \
	  { rm -rf $(CLIENTS); echo "no clients installed: their tests will be skipped" >&2; }

$(CLIENTS_JS)/node_modules/.done: $(CLIENTS_JS)/package-lock.json
	cd $(CLIENTS_JS) && npm ci --no-audit --no-fund --loglevel=error && touch node_modules/.done || \
	  echo "no node client installed: its test will be skipped" >&2

$(CONSOLE_JS)/node_modules/.done: $(CONSOLE_JS)/package-lock.json $(CONSOLE_JS)/unpack.mjs
	cd $(CONSOLE_JS) && npm ci --no-audit --no-fund --loglevel=error && node unpack.mjs && touch node_modules/.done || \
	  echo "no browser installed: the tests of the page will be skipped" >&2

browser: $(if $(shell command -v chromium),,$(CONSOLE_JS)/node_modules/.done)  ## a Chromium for the page's tests, where the machine has none

clients: $(CLIENTS)/.done $(CLIENTS_JS)/node_modules/.done  ## install the clients that tests/clients runs

serve: $(VENV)/.run  ## serve the bundled model: router, prefill node and decode node (ARGS="--port 9000")
	$(BIN)/baton serve $(ARGS)

# Two processes: more would starve the nodes that end-to-end tests start, on two cores.
JOBS ?= 2
test: $(VENV)/.dev clients browser  ## run every test (ARGS="tests/engine -k parity", JOBS=0: in one process)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

SOAKED := faults stalls strikes same_name damage late_network confused_peers many_aborts \
  hostile both_stopped two_routers bad_pair
soak: $(VENV)/.dev  ## the fault tests N times in a row, until one fails (N=20)
	for i in $$(seq $(N)); do echo "soak: $$i of $(N), $$(date +%T)"; \
	  OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q $(ARGS) \
	    $(SOAKED:%=tests/e2e/test_%.py) || exit 1; done

lint: $(VENV)/.dev  ## ruff (lint and format check) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

bench-serve: $(VENV)/.dev  ## start-up, handoff, router and memory; the last line is JSON (ARGS=--quick)
	$(BIN)/python -m benchmarks.bench_serve $(ARGS)

bench-api: $(VENV)/.dev  ## what the router's HTTP side costs; the last line is JSON (ARGS=--quick)
	$(BIN)/python -m benchmarks.bench_api $(ARGS)

bench-kv-layout: $(VENV)/.dev  ## block-major against layer-major KV pools
	$(BIN)/python -m benchmarks.bench_kv_layout $(ARGS)

bench-transfer: $(VENV)/.dev  ## KV blocks between two processes, by each transport; the last line is JSON
	$(BIN)/python -m benchmarks.bench_transfer $(ARGS)

bench-weight-dtype: $(VENV)/.dev  ## what narrow weights do to logits; the last line is JSON
	$(BIN)/python -m benchmarks.bench_weight_dtype $(ARGS)

bench-transfer-dtype: $(VENV)/.dev  ## what 8-bit transfers do to logits; the last line is JSON
	$(BIN)/python -m benchmarks.bench_transfer_dtype $(ARGS)

bench-digest: $(VENV)/.dev  ## what candidates for the units' digest cost beside the copy; the last line is JSON
	$(BIN)/python -m benchmarks.bench_digest $(ARGS)

bench-curve: $(VENV)/.dev  ## what the fleet's key costs: TCP with CURVE and without
	$(BIN)/python -m benchmarks.bench_curve $(ARGS)

bench-engine: $(VENV)/.dev  ## engine steps beside their floor and transformers; the last line is JSON
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.bench_engine $(ARGS)

bench-structured: $(VENV)/.dev  ## what grammars cost: a decode step with masks, compiling a schema; the last line is JSON
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.bench_structured $(ARGS)

bench-speculation: $(VENV)/.dev  ## what drafts gain and cost; the last line is JSON (ARGS=--quick)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.bench_speculation $(ARGS)

# The torch of .venv may be built without CUDA: GPU_PYTHON names an interpreter whose torch is not.
GPU_PYTHON ?= $(BIN)/python
DIR ?= gpu-results
gpu-check:  ## every GPU test and benchmark within 8 minutes, results into DIR (GPU_PYTHON=python3)
	$(GPU_PYTHON) scripts/gpu_check.py $(DIR) $(ARGS)

bench-gpu:  ## decode, prefill, attention and copies beside what the GPU can do; the last line is JSON
	$(GPU_PYTHON) -m benchmarks.bench_gpu $(ARGS)

bench-goodput: $(VENV)/.dev  ## what planning, tuning and switching roles bring; the last line is JSON (ARGS=--quick)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.bench_goodput $(ARGS)

bench-simulator: $(VENV)/.dev  ## simulated requests per minute of one core; the last line is JSON (ARGS="--nodes 100")
	$(BIN)/python -m benchmarks.bench_simulator $(ARGS)

validate-simulator: $(VENV)/.dev  ## the simulator beside real nodes on three workloads; the last line is JSON (ARGS=--quick)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.validate_simulator $(ARGS)

example-plan: $(VENV)/.dev  ## the plan of an example, in words and as docs/example-plan.png
	$(BIN)/python -m benchmarks.example_plan $(ARGS)

tuner-timeline: $(VENV)/.dev  ## draw what the online tuner does while the work changes: docs/tuner-timeline.png
	$(BIN)/python -m benchmarks.tuner_timeline $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(CLIENTS) $(CLIENTS_JS)/node_modules $(CONSOLE_JS)/node_modules build .mypy_cache .ruff_cache .pytest_cache *.egg-info
