# Needs only Python 3.11+, pip and make. `make demo` and `make test` share one environment, .venv.
PYTHON ?= python3
# Extra arguments for pip, e.g. PIP_ARGS="--index-url ..." to take torch from another index.
PIP_ARGS ?=
# The pinned releases; CONSTRAINTS=/dev/null takes the newest of everything.
CONSTRAINTS ?= constraints.txt
# Where the demo writes, and what it adds to `pyro-sam compare digits`.
OUT ?= results/digits
DEMO_ARGS ?=
# What `make demo` adds to `pyro-sam study`, which trains the settings that docs/study has chosen on 120 digits.
STUDY_ARGS ?= --data digits-120 --methods mfvi map sam ascended-previous
# Where the benchmark writes, and what it adds to `python -m benchmarks.step_time`.
BENCH_OUT ?= results/bench
BENCH_ARGS ?=
# How long `make soak` looks for differences, and where its seeds begin.
SOAK_SECONDS ?= 3600
SOAK_SEED ?= 0
# What `make test` adds to pytest, e.g. TEST_ARGS="-k perturbation"; a debugger wants one process, TEST_ARGS="-n 0 --pdb".
TEST_ARGS ?=

# The extra `outside`, and IVON for the benchmarks, whose other requirements are there already, without torchvision: nothing here uses it, and the
# build that comes from an index other than torch's breaks torchmetrics, which imports it where it is.
OUTSIDE := ivon-opt laplace-torch==0.3 asdfghjkl==0.1a4 backpack-for-pytorch curvlinops-for-pytorch einconv einops \
	linear_operator unfoldNd

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.pyro-sam-installed

.PHONY: help setup demo figure test soak bench lint docs links dist clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   compare the methods on the digits data set (results in $(OUT))"
	@echo "make figure run the demo and keep its figure for the README"
	@echo "make test   run the whole suite: tests, README, tutorials"
	@echo "make soak   two estimators in lockstep for SOAK_SECONDS (an hour), then 20 000 steps in which nothing may grow"
	@echo "make bench  time a training step against other estimators (results in $(BENCH_OUT))"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documentation (docs/_build/html); warnings are errors, internal links and spelling are checked"
	@echo "make links  check the links to other sites, which needs the network"
	@echo "make dist   build the wheel and the sdist, and look into both"
	@echo "make clean  remove what the commands above made, $(VENV) included"

setup: $(STAMP)

$(BIN)/python:
	@echo "== creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyro_sam needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch goes in first and alone: the pinned build decides what everything after it resolves to.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "== installing pyro_sam and its bench, test and lightning extras into $(VENV)"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[bench,test,lightning,docs]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps $(OUTSIDE)
	@touch $@

demo: $(STAMP)
	@echo "== comparing the methods on digits; results in $(OUT)"
	@$(BIN)/pyro-sam compare digits --seeds 5 --out $(OUT) $(DEMO_ARGS)
	@echo "== 120 digits, 20 seeds, settings chosen before; results in $(OUT)/tuned"
	@$(BIN)/pyro-sam study $(STUDY_ARGS) --settings-of docs/study --out $(OUT)/tuned

figure: demo
	@mkdir -p docs
	@cp $(OUT)/compare.png docs/compare_digits.png

test: $(STAMP)
	@echo "== running the tests, the README's examples and the tutorials"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests README.md tutorials --nbmake -n logical --dist worksteal $(TEST_ARGS)

soak: $(STAMP)
	@echo "== fast and ordinary steps in lockstep for $(SOAK_SECONDS) seconds from seed $(SOAK_SEED)"
	@OMP_NUM_THREADS=1 SOAK_SECONDS=$(SOAK_SECONDS) SOAK_SEED=$(SOAK_SEED) $(BIN)/python -m tests.test_lockstep
	@echo "== 20 000 steps: memory, param store and optimiser state must not grow"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

# KINETO_LOG_LEVEL: torch's profiler, which reads the memory, would report every start and stop.
bench: $(STAMP)
	@echo "== timing a training step; results in $(BENCH_OUT)"
	@KINETO_LOG_LEVEL=99 $(BIN)/python -m benchmarks.step_time --out $(BENCH_OUT) $(BENCH_ARGS)

lint: $(STAMP)
	@echo "== checking style and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP)
	@echo "== building the documentation; it lies in docs/_build/html"
	@rm -rf docs/_build/html
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d docs/_build/doctrees docs docs/_build/html
	@$(BIN)/python docs/check.py docs/_build/html
	@$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md docs tutorials pyro_sam examples

links: $(STAMP)
	@$(BIN)/python -m sphinx -b linkcheck --quiet -d docs/_build/doctrees docs docs/_build/links

dist: $(STAMP)
	@echo "== building the wheel and the sdist"
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist . > /dev/null
	@$(BIN)/python -m zipfile -l dist/*.whl | grep pyro_sam/py.typed > /dev/null
	@$(BIN)/python -m tarfile -l dist/*.tar.gz | grep pyro_sam/py.typed > /dev/null
	@ls dist

clean:
	rm -rf $(VENV) build dist results docs/_build docs/_generated docs/tutorials *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
