# Common commands. `make demo` and `make test` first create .venv themselves.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := 2.13.0
# CUDA builds of torch install their own Triton. This version is for machines without GPU: its interpreter runs the
# kernel tests and its assembler checks their machine code.
TRITON := 3.9.0
# Index of CPU builds of torch, for when pip's default index has none; named here only.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_OUT ?= runs/demo

.PHONY: setup demo test test-slow lint typecheck clean

setup: $(READY)

# Machines without GPU get the CPU build of torch and no CUDA packages. DeepSpeed is installed without compiling its C++
# operations: none is needed on a CPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlm-clt needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then \
		$(RUN)/pip install -q -c constraints.txt "torch==$(TORCH)"; \
	else \
		{ $(RUN)/pip install -q -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null || \
		$(RUN)/pip install -q -c constraints.txt --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu"; } && \
		$(RUN)/pip install -q -c constraints.txt "triton==$(TRITON)"; \
	fi
	DS_BUILD_OPS=0 $(RUN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

# Captures, trains, attributes and checks on the toy model; prints the measures and the page to open.
demo: $(READY)
	$(RUN)/clt demo --out $(DEMO_OUT)

# All fast tests; no GPU needed.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2 $(PYTEST_ARGS)

# Slow tests: retraining the toy model, repeated kills.
test-slow: $(READY)
	OMP_NUM_THREADS=2 $(RUN)/pytest -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

# mypy cannot follow the package-dir mapping in place, so it checks the installed layout.
typecheck: $(READY)
	rm -rf .typecheck build
	$(RUN)/pip install -q --no-deps --no-build-isolation --target .typecheck .
	cp -r benchmarks .typecheck
	cd .typecheck && ../$(RUN)/mypy --config-file ../pyproject.toml --python-executable ../$(RUN)/python -p clt -p benchmarks

clean:
	rm -rf $(VENV) .typecheck build *.egg-info runs
