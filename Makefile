# Every target sets itself up in .venv. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOURCES := setup.py pyproject.toml requirements/dev.txt $(wildcard csrc/*)

.PHONY: demo test bench kernels lint format docs sanitize clean

demo: $(READY)
	$(BIN)/python examples/diabetes.py

test: $(READY)
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python -m benchmarks

kernels: $(READY)
	$(BIN)/python -m tools.compile_report
	$(BIN)/python -m tools.predict --check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/pip install -q -r requirements/docs.txt
	$(BIN)/mkdocs build --strict

sanitize: $(READY)
	PYTHON=$(BIN)/python bash tests/native/sanitize.sh

# Editable, and without build isolation: what the build needs is in requirements/dev.txt.
$(READY): $(SOURCES)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build *.egg-info
