# make demo and make test need only Python >= 3.11; each makes .venv on its first run and reuses it afterwards.
# With TORCH=2.11.0, and PYTHON=python3.12, they use an environment of their own beside it.
PYTHON ?= python3
ifdef TORCH
VENV := .venv-$(TORCH)-$(notdir $(PYTHON))
# that very release, whatever a constraint file of this machine's pip says
export PIP_CONSTRAINT := /dev/null
else
VENV := .venv
endif
BIN := $(VENV)/bin

# About ten minutes on two cores: private names, kernels, passes, the plug-in with inductor, models.
SLICE := test_private test_models kernels passes/test_graph passes/test_verify compile/test_plugin
# inductor takes longest for these: three of them show that it does what it does on the newest
LONG := within_float_rounding and not (gpt2 or resnet18 or deit)

.PHONY: help demo study examples figures gpu test slice whole fuzz conformance zoo mutants endurance lint format wheel clean

help:
	@echo "make demo     two minutes: a step dense and packed, the report as a page, a short training"
	@echo "make study    train on scikit-learn's digits with several seeds, eager and compiled"
	@echo "make examples run every example with its defaults"
	@echo "make figures  measure what the documents say, and write it there"
	@echo "make gpu      on a machine with a GPU: its tests and figures, nine minutes, no .venv"
	@echo "make test     run the tests; TORCH=2.11.0 PYTHON=python3.12 in an environment of its own"
	@echo "make slice    run a part of them, about ten minutes"
	@echo "make whole    all pairs of ops and all compiled ops, of which 'make test' runs a part"
	@echo "make fuzz     check random models: GRAPHS=10000 AOT=300 INDUCTOR=300 SEED=0 WORKERS=2"
	@echo "make conformance PyTorch's tables of ops and modules, packed; hours: ARGS='--quick --only conv'"
	@echo "make zoo      models of every kind, packed; hours: ARGS='--quick --only ^hand' for those written by hand"
	@echo "make mutants  rows of the op table that are wrong on purpose, and whether a test sees each; a minute"
	@echo "make endurance 2,000 steps of a small model in each way: memory, losses to the bit, a resume"
	@echo "make lint     ruff (rules and format) and mypy"
	@echo "make format   let ruff rewrite the files"
	@echo "make wheel    build a wheel and a source distribution into dist/"
	@echo "make clean    remove what the other targets made, the environments too"

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

study: $(VENV)/.installed-demo
	$(BIN)/python examples/digits.py

# One seed of what trains several models, and two ranks of what runs on several.
examples: $(VENV)/.installed-test
	$(BIN)/python examples/deit.py
	$(BIN)/python examples/detection.py
	HF_HUB_OFFLINE=1 $(BIN)/python examples/bert.py --seeds 1 --no-compile
	$(BIN)/python examples/gpt2.py
	$(BIN)/python examples/llama_lora.py
	$(BIN)/torchrun --nproc-per-node 2 examples/ddp.py
	$(BIN)/torchrun --nproc-per-node 2 examples/fsdp.py

# The figures of the documents, and the documents themselves. More than an hour.
figures: $(VENV)/.installed-test
	$(BIN)/python examples/figures.py

# With the interpreter at hand, into which the package is installed. OUT: a folder that gets a copy of the figures;
# TESTS= leaves the tests out, ARGS='--models deit_s' picks rows.
TESTS ?= tests/gpu
gpu:
	$(PYTHON) -m dropit_fx.cli bench gpu $(if $(TESTS),--tests $(TESTS)) $(if $(OUT),--copy-to '$(OUT)') $(ARGS)

# The models of the tests are built from configs or installed as packages: nothing is downloaded. Each worker has one
# thread: those of two workers on two cores would wait for each other, at full load.
test: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

slice: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -k 'not ($(LONG))' $(wildcard $(SLICE:%=tests/%) $(SLICE:%=tests/%.py))

whole: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DROPIT_WHOLE=1 $(BIN)/pytest --numprocesses 2 --dist worksteal tests/ops/test_pairs.py \
		tests/passes/test_bytes.py -k 'behind_every_other or compiled_case'

# Random models, other ones with another SEED. WORKERS: processes. Prints the smallest program for each kind of
# failure, and fails where there is one.
GRAPHS ?= 10000
AOT ?= 300
INDUCTOR ?= 300
SEED ?= 0
WORKERS ?= 2
fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --graphs $(GRAPHS) --aot $(AOT) --inductor $(INDUCTOR) \
		--seed $(SEED) --workers $(WORKERS)

# Results are kept in build/conformance.jsonl: a second run goes on where this one ends; ARGS=--again begins anew.
conformance: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/conformance.py $(ARGS)

# In build/zoo.jsonl, in the same way.
zoo: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/zoo.py $(ARGS)

# Rows of the op table that are wrong on purpose: the tests of the row are to see each. ARGS="--only gelu" picks rows.
mutants: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/mutants.py $(ARGS)

# 2,000 steps of a small model in each way: memory stays flat, seeds decide every bit. ARGS="--steps 200 --ways eager"
endurance: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/endurance.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"dropit_fx needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# The order-only prerequisite: the interpreter's own time stamp says nothing about what is installed.
# Python sources are read where they are; C sources are compiled when the package is installed.
$(VENV)/.installed-%: pyproject.toml $(wildcard dropit_fx/kernels/*.c) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH:%=torch==%) --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
