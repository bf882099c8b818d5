# demo: train a small model on real text, sample from it, write a report.   test: all tests.
# lint: formatters, types, layers.   asan: op tests under AddressSanitizer and UBSan.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format clean

# Reinstalled when what decides the install changes; a change in csrc/ rebuilds the extension alone.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(shell find csrc -type f 2>/dev/null)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "warploom needs Python 3.10 or newer, this is %s" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: the extension compiles against the torch it will run with.
	$(PIP) pip setuptools ninja numpy torch
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/warploom demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs --no-run-if-empty $(BIN)/clang-format -i

clean:
	rm -rf build engine/*.egg-info engine/warploom/_C*.so engine/warploom/_build.json
