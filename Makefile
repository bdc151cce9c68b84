# Every target sets up what it needs on a fresh machine; stamps make the second run quick.
# Wanted on the machine: Python 3.11 or newer and a C++ compiler (Inductor compiles for the CPU with it).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
# Tests that compile are bound by CPU: one single-threaded worker to a core, four at most (memory).
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -gt 4 ] && n=4; echo $$n)
PYTEST := $(BIN)/python -m pytest

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Inside the checkout, so that `make clean` is a cold start and two checkouts never share artifacts.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/build/inductor

.PHONY: demo quick test bench bench-kv architectures multimodal docs lint sweep clean
.DEFAULT_GOAL := test

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, %d.%d found; set PYTHON=" % v)'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch first and alone, pinned: pip then takes the CPU build where that is what is on offer.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH) setuptools wheel
	@touch $@

$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing mom_compile[$*]"
	@$(PIP) --no-build-isolation -e '.[$*]'
	@touch $@

demo: $(VENV)/.extra-demo
	@$(BIN)/python -m examples.demo $(ARGS)

# Every way to prefill beside every other, and docs/benchmarks.md of it; then predicted peaks beside measured ones.
bench: $(VENV)/.extra-bench
	@$(BIN)/python -m benchmarks.suite $(ARGS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.predictions $(filter --fresh,$(ARGS))

bench-kv: $(VENV)/.extra-bench
	@$(BIN)/python -m benchmarks.kv $(ARGS)

# Every decoder of transformers, small: what is there already is not run again (ARGS="--only llama --redo").
architectures: export OMP_NUM_THREADS := 1
architectures: $(VENV)/.extra-bench
	@$(BIN)/python -m benchmarks.architectures $(ARGS)

# Multimodal models and encoders, small and compiled, in the same way.
multimodal: export OMP_NUM_THREADS := 1
multimodal: $(VENV)/.extra-bench
	@$(BIN)/python -m benchmarks.multimodal $(ARGS)

# The documentation site, in build/docs. A broken link, a warning or an undocumented export is an error.
# Without the theme's notice on its end of life (2027-05-05).
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.extra-docs
	@$(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(VENV)/.extra-test
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test quick sweep: export OMP_NUM_THREADS := 1
test quick sweep: export TORCHINDUCTOR_COMPILE_THREADS := 1

# The inner loop: rule laws, passes and runtime, without whole models.
QUICK := $(wildcard tests/test_rules_*.py) $(addprefix tests/test_, attention_kernels.py backings.py \
	contributing.py copy_engine.py demanded_rows.py folds.py layers.py rows_ahead.py properties.py residency.py runtime.py slicing.py strides.py verify.py)

quick: $(VENV)/.extra-test
	@$(PYTEST) -q -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(QUICK) $(ARGS)

test: lint $(VENV)/.extra-test-triton
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not gpu" $(ARGS)

sweep: $(VENV)/.extra-test $(VENV)/.extra-test-triton
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m slow --timeout 3600 $(ARGS)

clean:
	@rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
