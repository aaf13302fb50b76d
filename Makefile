# make quickstart: install into .venv, prune and train a network on real digits beside its dense twin
# make test: the same environment, the whole suite
# make docs: the book, into site/

PYTHON ?= python3
PY := .venv/bin/python
RUN := $(PY) -m pl_prune

.PHONY: quickstart test docs lint types clean

quickstart: .venv/installed
	rm -rf runs/quickstart
	$(RUN) fit --config recipes/quickstart.yaml --prune=Dense --trainer.logger.init_args.version=dense
	$(RUN) fit --config recipes/quickstart.yaml
	@echo
	@$(RUN) compare runs/quickstart/dense runs/quickstart/snip

test: .venv/installed
	$(PY) -m pytest -n 2 --dist loadfile

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: .venv/installed
	$(PY) -m mypy

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "pl_prune: expected Python 3.10 or newer, found %d.%d. Run make PYTHON=/path/to/python3" % v[:2])'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[all,docs,dev]'
	touch .venv/installed

clean:
	rm -rf .venv runs site
