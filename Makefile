# Two commands are all the set-up there is:  make demo   and   make test
# Another interpreter: PYTHON=python3.12 make test. Another world: make demo SEED=1.
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin
# The interpreter's version is part of the stamp: another PYTHON makes the environment anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := $(VENV)/.installed-$(VERSION)
INSTALLED_DEV := $(VENV)/.installed-dev-$(VERSION)
INSTALLED_TPU := $(VENV)-tpu/.installed-$(VERSION)

.PHONY: demo test test-slow lint format torch clean

# On one CPU device, so that batches do not depend on how many cores there are; rounding still may.
demo: $(INSTALLED)
	$(BIN)/main-jax run configs/demo.yaml --cpu-devices 1 --output_dir runs/demo --seed $(SEED)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# The compiler for TPUs has an environment of its own, so that no other test depends on it.
test-slow: $(INSTALLED_DEV) $(INSTALLED_TPU)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV)

format: $(INSTALLED_DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# PyTorch is not a dependency: with it installed, the tests also compare with transformers on PyTorch, live.
torch: $(INSTALLED_DEV)
	$(BIN)/python -m pip install torch==2.13.0 accelerate

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("main_jax needs Python 3.11 or newer; say PYTHON=python3.12 make ...") if sys.version_info < (3, 11) else None'
	rm -f $(VENV)/.installed*
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e . -c constraints.txt
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	touch $@

$(INSTALLED_TPU): $(INSTALLED)
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install -e '.[tpu]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tpu dist .pytest_cache .ruff_cache
