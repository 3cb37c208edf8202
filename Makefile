# Every target creates .venv and installs what it needs. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Named in full, accelerate prints no list of assumed defaults; without a thread count it would set one thread.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(or $(OMP_NUM_THREADS),$(CORES))

STUDIES := real real_arms real_cost real_often real_attention real_explanation real_labels real_compression real_monte_carlo \
	real_pair real_teacher real_recipe real_precision real_kd cpu cpu_maps cpu_pair cpu_monte_carlo cpu_teacher check

.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-gpu bench study report docs lint format clean

demo: $(VENV)/.installed-demo
	$(LAUNCH) recipes/train_igkd.py

# One process a core, each with one thread: more would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(CORES) --dist loadfile

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "slow and not gpu" -n $(CORES) --dist loadfile

test-gpu: $(VENV)/.installed-dev
	$(BIN)/pytest -q -m gpu

# Into a file of its own, as the committed ones have other machines' figures. Its data: see CONTRIBUTING.md.
bench: $(VENV)/.installed-demo
	$(BIN)/python benchmarks/attribution.py --out build/attribution.json

# Into folders of its own, as the committed rows would leave nothing to train. CIFAR-10 and the released student are expected
# beside the repository, see the header of the configuration.
study: $(VENV)/.installed-study
	$(LAUNCH) recipes/study.py --config recipes/configs/study_check.yaml --parallel 2 \
		--output_dir runs/make_study/results --work_dir runs/make_study

# Writes recipes/RESULTS.md with its figures, and RESULTS.html: the same as one page, in light and dark, not committed.
report: $(VENV)/.installed-study
	$(BIN)/python recipes/study_report.py $(STUDIES:%=recipes/configs/study_%.yaml)

# Into build/site; any warning ends it.
docs: $(VENV)/.installed-docs
	$(BIN)/zensical build --config-file .zensical.toml --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Leaves runs/ alone: it holds results.
clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that venv writes: a venv that failed half-way is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --progress-bar off --editable '.[$*]'
	@touch $@
