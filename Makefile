# Every target runs in .venv, which `make setup` makes. Each is safe to run again.
PYTHON ?= python3
# The index pip takes torch from; empty means pip's own. PyTorch's installation page names the CPU-only one.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin

# As in protlm itself: waiting threads sleep, so that tests keep their time on a busy machine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup lint types imports docs test test-cuda test-slow coverage bench check demo clean

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard protlm/data/*/*.cpp) $(wildcard protlm/data/parsing/*.h) $(wildcard protlm/ops/cpp/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

setup: $(VENV)/.installed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-cache

# As many tests at a time as there are cores; each of them uses one. Who has done its half takes tests from the other,
# so that what a file's tests share is made once and nobody idles while the long ones at an end are run.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal
test: setup
	$(PYTEST)

# The long checks of the CUDA kernels: run them where a kernel has changed.
test-cuda: setup
	$(PYTEST) -m cuda

test-slow: setup
	$(PYTEST) -m 'slow or cuda'

coverage: setup
	$(PYTEST) --cov=protlm --cov-report=term

# Into site/; a broken link or a docstring that cannot be read fails it. The variable stops an advertisement of its theme.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint types imports docs test

bench: setup
	$(BIN)/python scripts/bench/attention.py
	$(BIN)/python scripts/bench/local.py
	$(BIN)/python scripts/bench/fasta.py
	$(BIN)/python scripts/bench/prep.py
	$(BIN)/python scripts/bench/cluster.py
	$(BIN)/python scripts/bench/train_step.py
	$(BIN)/python scripts/bench/embed.py
	$(BIN)/python scripts/bench/score.py
	$(BIN)/python scripts/bench/evaluate.py

# The four commands on families of real proteins: make demo FASTA=my.fasta runs them on yours.
FASTA ?=
DEMO ?= demo
demo: setup
	$(BIN)/python scripts/demo.py $(if $(FASTA),--fasta "$(FASTA)") --out "$(DEMO)"

clean:
	rm -rf $(VENV) build dist site *.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
