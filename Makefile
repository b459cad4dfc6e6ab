# `make sample` and `make test` set up what they need in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help sample demo web test test-fast test-long lint format clean
help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Rebuilt when the dependencies change. Sampling needs a quarter of what the tests need.
$(VENV)/.runs: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

sample: $(VENV)/.runs  ## inpaint a photograph with the network that comes along; look at outputs/sample_grid.png
	$(BIN)/python sample.py --model tiny --image examples/gallery/peaks.jpg --mask examples/gallery/peaks_mask.png \
		--output outputs/sample.png --mask-dilation 13 --grid --overwrite
	@echo "original | mask | result: outputs/sample_grid.png"

$(VENV)/.serves: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

demo: $(VENV)/.serves  ## serve a page to paint on (with tiny), on this machine: http://127.0.0.1:7860
	$(BIN)/python demo.py --model tiny

$(VENV)/.exports: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --editable ".[export]"
	touch $@

# npm runs no script of a package's: onnxruntime-web needs none.
web/node_modules: web/package-lock.json
	@command -v npm >/dev/null || { echo "make web: npm not found; it comes with Node.js (https://nodejs.org)"; exit 1; }
	npm ci --prefix web --ignore-scripts --no-audit --no-fund --silent
	touch $@

web: web/node_modules $(VENV)/.exports  ## the same in the browser alone: http://127.0.0.1:8000
	$(BIN)/python export.py tiny web/model --format onnx --half-weights --overwrite
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory web 8000

# The TPU compiler in an environment of its own (see pyproject.toml); one test is skipped where it cannot be had.
$(VENV)-aot/.installed: pyproject.toml
	-test -d $(VENV)-aot || $(PYTHON) -m venv $(VENV)-aot
	-$(VENV)-aot/bin/python -m pip install --quiet --editable ".[aot]" && touch $@

# Two processes of up to 10 GB; each test file runs in one of them. `make test WORKERS=1` for less memory.
WORKERS ?= 2
# Files as the tests' conftest.py orders them: the long ones first.
SPREAD := --dist loadfile --no-loadscope-reorder

# The browser's tests are skipped where there is no npm.
.PHONY: node
node:
	-command -v npm >/dev/null && $(MAKE) --no-print-directory web/node_modules

# On a GPU: JAX_PLATFORMS=cuda,cpu make test (the simulated devices stay on the CPU).
test: $(VENV)/.installed node  ## the tests, on the CPU, without network
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/python -m pytest -n $(WORKERS) $(SPREAD) -m "not long"

# One at a time: most of them start several processes.
test-long: $(VENV)/.installed $(VENV)-aot/.installed  ## the others: hosts that fail, buckets, whole command lines; half an hour
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/python -m pytest -m long

test-fast: $(VENV)/.installed  ## the tests that compile little: a newcomer's inner loop
	JAX_PLATFORMS=$${JAX_PLATFORMS-cpu} $(BIN)/python -m pytest -n $(WORKERS) $(SPREAD) -m "not slow"

lint: $(VENV)/.installed  ## ruff: errors and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environments, what tests compiled, and outputs
	rm -rf $(VENV) $(VENV)-aot .pytest_cache outputs
