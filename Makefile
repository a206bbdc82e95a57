# Every target sets itself up in .venv. PYTHON chooses the interpreter (3.10 or newer), REQUIREMENTS
# another list of versions.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
REQUIREMENTS ?= requirements/dev.txt
# How many test files run side by side.
WORKERS ?= 2
SOURCES := setup.py pyproject.toml $(REQUIREMENTS) $(wildcard csrc/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp tests/native/*.c tests/native/*.cpp benchmarks/native/*.cpp)

.PHONY: demo test bench kernels lint format docs sanitize wheel clean

demo: $(READY)
	$(BIN)/python examples/diabetes.py

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

bench: $(READY)
	$(BIN)/python -m benchmarks

kernels: $(READY)
	$(BIN)/python -m tools.compile_report
	$(BIN)/python -m tools.predict --check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(READY)
	$(BIN)/pip install -q -r requirements/docs.txt
	$(BIN)/mkdocs build --strict

sanitize: $(READY)
	PYTHON=$(BIN)/python bash tests/native/sanitize.sh

# A wheel of this machine and its PyTorch, repaired, checked, and tested where no compiler is. TESTS
# are options of pytest, to run a part.
wheel: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements/wheel.txt
	$(BIN)/cibuildwheel --print-build-identifiers --platform linux --archs x86_64,aarch64
	rm -rf build/lib* build/bdist* build/wheel dist
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so \
	  --exclude libc10.so -w dist build/wheel/*.whl
	$(BIN)/python -m tools.wheel check dist/*.whl --pytorch $$($(BIN)/python -c \
	  'import torch; print(*torch.__version__.split(".")[:2], sep=".")')
	$(BIN)/python -m tools.wheel test dist/*.whl -- $(TESTS)

# Editable, and without build isolation: what the build needs is in requirements/dev.txt.
$(READY): $(SOURCES)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r $(REQUIREMENTS)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build *.egg-info
