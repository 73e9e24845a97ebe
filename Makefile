# `make demo` and `make test` do all the set-up themselves; a second `make setup` is instant.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := dev,docs,lightning,loggers,hf,ray,scattering,search,codec,federated
# The pin makes machines without a GPU install the CPU build of PyTorch; the package itself declares a range.
TORCH ?= torch==2.13.0

.PHONY: setup demo test lint docs bench verify clean browser

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH) --editable '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/coloss compare digits --methods cross-entropy,dhkd,trp --seeds 3

# One worker for each file: the examples of a page build on each other.
test: setup browser
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The report is looked at in headless Chromium; without it those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	       && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	  || echo "no Chromium here: the browser tests will be skipped"

lint: setup
	$(BIN)/ruff check src tests docs
	$(BIN)/ruff format --check src tests docs
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/coloss bench

verify: setup
	$(BIN)/coloss verify dhkd mw-loss lejepa rankme trp

clean:
	rm -rf .venv build dist site runs
