# Every target sets up what it needs in a virtual environment of its own. `make help` says what there is.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
SOURCES := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*)

.PHONY: help demo test test-slow torture sanitize bench peers lint clean

help:
	@echo "make demo       the main job on a generated model: extract, apply, verify, report, load with transformers"
	@echo "make test       the test suite (minutes)"
	@echo "make test-slow  the exhaustive tests as well"
	@echo "make torture    long counts of the random tests"
	@echo "make sanitize   the compiled code under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make bench      kernels and whole merges beside a memory loop, torch, cat and cp"
	@echo "make peers      whole merges beside mergekit and hand-written loops (installs them in a venv of their own)"
	@echo "make lint       ruff and mypy"

# Where torch is importable already, the environment sees it (and what lies beside it) through a .pth file, so that no
# second copy is installed. Elsewhere torch comes first and alone: nothing else may choose its build.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	@if host=$$($(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null); then \
	    echo "using the torch in $$host"; \
	    echo "$$host" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host-torch.pth; \
	else \
	    $(BIN)/python -m pip install -q $(TORCH); \
	fi

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[test,bench,demo]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m "not gpu and not root and not torture"

torture: $(VENV)/installed
	$(BIN)/python -m pytest -q -m torture

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/installed
	$(BIN)/python -m ires_kernels.bench all

peers: $(VENV)/installed
	$(BIN)/python bench/peers.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info ires_kernels/_native*.so .pytest_cache .mypy_cache .ruff_cache
