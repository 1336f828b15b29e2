# Each target makes its own .venv on a fresh machine; constraints.txt pins what is tested.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# of make compat: the oldest torch that is supported, or the one that is named
TORCH ?= 2.9.1
COMPAT := .venv-compat
# a process that a test has ended is not started again: it would meet the test again
SPREAD := -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test slow fuzz compat lint docs site-test pictures figures clean
.DELETE_ON_ERROR:

$(VENV)/pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

# one stamp for each extra: make demo need not install what only the tests want
$(VENV)/extra-%: $(VENV)/pip pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: $(VENV)/extra-demo
	$(BIN)/python demo/sentiment.py

test: $(VENV)/extra-test
	$(BIN)/python -m pytest $(SPREAD)

slow: $(VENV)/extra-test
	$(BIN)/python -m pytest $(SPREAD) -m 'slow and not fuzz'

# not in .ci/run: the random and crossed cases that there are more of than it has time for
fuzz: $(VENV)/extra-test
	$(BIN)/python -m pytest -n auto -m fuzz -o faulthandler_timeout=0

# always a fresh installation, without the pins; libraries that want one torch of their own are left out
compat:
	$(PYTHON) -m venv --clear $(COMPAT)
	$(COMPAT)/bin/python -m pip install --quiet --upgrade pip
	$(COMPAT)/bin/python -m pip install --quiet "torch==$(TORCH)" --editable '.[compat]'
	$(COMPAT)/bin/python -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
	$(COMPAT)/bin/python -m pytest $(SPREAD) -p no:cacheprovider

lint: $(VENV)/extra-lint $(VENV)/extra-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .

# both must build it: mkdocs is what the site is written for, zensical what it can move to
docs: $(VENV)/extra-docs
	$(BIN)/zensical build --strict --clean
	$(BIN)/mkdocs build --strict

# in a browser, where there is one
site-test: $(VENV)/extra-docs $(VENV)/extra-test $(VENV)/extra-browser
	$(BIN)/python -m pytest -n auto -rs tests/docs/test_site.py

pictures: $(VENV)/extra-test
	$(BIN)/python -m tests.support.pictures

figures: $(VENV)/extra-test
	$(BIN)/python benchmarks/figures.py

clean:
	rm -rf $(VENV) $(COMPAT) site demo_output .pytest_cache .mypy_cache .ruff_cache
