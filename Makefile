# `make bench` and `make test` need Python 3.11 and nothing else: each makes its environment first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet
# More for pytest, as in: make bench ARGS="--scenario digits-mlp2 --seeds 3"
ARGS ?=

.PHONY: help bench baseline test test-oldest campaigns kills mutants wheels report docs gpu lint lock audit licences types clean

help:
	@echo "make bench        every study's short scenarios on embedded data, with one summary (ARGS=... for pytest)"
	@echo "make test         the tests"
	@echo "make campaigns    every bad file and input, kills, full disks, assignments: attempts by kind (minutes)"
	@echo "make mutants      200 planted faults: which ones no test catches (hours; goes on where it was interrupted)"
	@echo "make kills        a Ray cluster whose workers are killed twenty times, alone on the machine"
	@echo "make wheels       both wheels, built, and run outside the checkout"
	@echo "make test-oldest  tests of kernels, symmetry and matching with the lowest versions of all dependencies"
	@echo "make report       the committed tables and figures anew, from the committed rows"
	@echo "make baseline     results/baseline anew, after a change of accuracy or cost that is meant"
	@echo "make docs         the documentation, into site/"
	@echo "make types        mypy on the public interface"
	@echo "make gpu          kernels and FGMT on a CUDA device: correctness, ceilings, speed (eight minutes); needs no .venv"
	@echo "make lint         style"
	@echo "make lock         requirements.lock anew, of pyproject.toml (ARGS=--upgrade for newer versions)"
	@echo "make audit        known vulnerabilities of what the lock names"
	@echo "make licences     docs/licences.txt anew"
	@echo "make clean        remove the environments and the caches"

bench: .venv/installed
	.venv/bin/python -m pytest bench --benchmark-only $(ARGS)

# One thread a process: two processes with two threads each get in one another's way.
test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto $(ARGS)

campaigns: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/campaigns -n auto -m "" $(ARGS)

mutants: .venv/installed
	.venv/bin/python tests/mutants.py $(ARGS)

wheels: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/test_wheels.py -m slow $(ARGS)

kills: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/bench/test_engines.py -m slow $(ARGS)

report: .venv/installed
	.venv/bin/regraft report README.md docs/*.md results/*.md results/*/README.md --results results
	rm -f results/index.html

baseline: .venv/installed
	rm -rf results/baseline
	OMP_NUM_THREADS=1 .venv/bin/regraft bench --study transfer --study fusion --study fast \
		--results results/baseline --rows-only

docs: .venv/installed
	.venv/bin/mkdocs build

types: .venv/installed
	.venv/bin/mypy

# Needs torch, triton, numpy and scipy alone, of any python: make gpu PYTHON=python3 ARGS="--out DIR"
gpu:
	PYTHONPATH=src:kernels:bench $(or $(PYTHON),python3) -m regraft_bench.kernels.gpu $(or $(ARGS),--out gpu-rows)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto tests/kernels tests/symmetry tests/matching $(ARGS)

# The stamp is the last thing made: an interrupted installation is taken up again.
# Nothing is installed whose hash is not in the lock: hatchling, which builds the package itself, is there then.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	@echo "installing what regraft needs into .venv, by version and hash (once; a minute or more)"
	@$(PIP) --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

lock: .venv/installed
	.venv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --no-annotate --quiet --output-file requirements.lock $(ARGS)

audit: .venv/installed
	.venv/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock $(ARGS)

licences: .venv/installed
	.venv/bin/pip-licenses --order=license --ignore-packages regraft | sed 's/ *$$//' >docs/licences.txt

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	@echo "installing the lowest versions that pyproject.toml allows into .venv-oldest (once)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-oldest/bin/python -m pip install --quiet uv
	@.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		-e '.[assignment,test]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .cache site .pytest_cache .ruff_cache .hypothesis .benchmarks build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
