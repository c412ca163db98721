# Everything a newcomer types. `make demo` and `make test` do all of their own set-up in .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := 2.13.0
# CUDA builds of torch bring the Triton they were made with; only where there is no GPU do we choose one, whose
# interpreter runs the kernel tests and whose assembler checks their machine code.
TRITON := 3.9.0
# Where CPU builds of torch come from when pip's own sources have none; the only place that names it.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
DEMO_OUT ?= runs/demo

.PHONY: setup demo test test-slow lint typecheck clean

setup: $(READY)

# A machine without GPU gets torch's CPU build, so that nothing pulls CUDA packages. DeepSpeed is installed without
# building its C++ operations: none is needed on a CPU.
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

# Captures, trains, attributes and checks on the toy model; prints the numbers and the page to open.
demo: $(READY)
	$(RUN)/clt demo --out $(DEMO_OUT)

# All tests that take seconds; they need no GPU.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2 $(PYTEST_ARGS)

# The long ones: retraining the toy model, repeated kills.
test-slow: $(READY)
	OMP_NUM_THREADS=2 $(RUN)/pytest -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

# Checkers cannot follow the folder graft of pyproject.toml in place, so they read the installed layout.
typecheck: $(READY)
	rm -rf .typecheck build
	$(RUN)/pip install -q --no-deps --no-build-isolation --target .typecheck .
	cp -r benchmarks .typecheck
	cd .typecheck && ../$(RUN)/mypy --config-file ../pyproject.toml --python-executable ../$(RUN)/python -p clt -p benchmarks

clean:
	rm -rf $(VENV) .typecheck build *.egg-info runs
