# What people type: make demo, make test. Needs python3 >= 3.10 and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

# MLX for the CPU where there is no Metal. On a Linux machine with an NVIDIA GPU: make BACKEND=cuda demo
ifeq ($(shell uname -s),Darwin)
BACKEND ?=
else
BACKEND ?= cpu
endif
PROJECT := .$(if $(BACKEND),[$(BACKEND)])
comma := ,
PROJECT_WITH = .[$(if $(BACKEND),$(BACKEND)$(comma))$(1)]

.PHONY: help demo test test-darwin lint metal reference clients clean

help:
	@echo "make demo       set up .venv, convert a small trained model, hold a short conversation"
	@echo "make test       run the tests"
	@echo "make test-darwin  on Linux, run them with what Python has on macOS, and no more"
	@echo "make lint       ruff, mypy as on Linux and as on macOS, shellcheck, and the workflows against their schema"
	@echo "make metal      every Metal kernel in every format, in an emulation (needs g++ or clang++; two minutes)"
	@echo "make reference  compare with transformers, mlx-lm and mlx-vlm (installs torch), then the slow tests"
	@echo "make clients    agents and packages as they come, against the server (needs node and git; 4 GB)"
	@echo "make clean      remove .venv, .clients and demo"

# The model is a small one, trained on what examples/small_moe generates; its README says what it can do.
demo: demo/small_moe/flashmoe.json
	@$(RUN) examples/demo.py demo/small_moe

demo/small_moe/flashmoe.json: examples/small_moe/model/model.safetensors $(VENV)/installed
	@rm -rf demo/small_moe
	$(RUN) -m mlx_flashmoe convert --hf-path examples/small_moe/model --mlx-path demo/small_moe

test: $(VENV)/installed-test
	$(RUN) -m pytest $(ARGS)

# In every process sitecustomize.py of that folder is imported first.
test-darwin: $(VENV)/installed-test
	PYTHONPATH='$(CURDIR)/tests/darwin' $(RUN) -m pytest $(ARGS)

lint: $(VENV)/installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --platform linux
	$(RUN) -m mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(VENV)/bin/shellcheck .ci/*
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# In one process, whose report at the end then knows of every launch.
metal: $(VENV)/installed-test
	PYTHONPATH=tests $(RUN) -m pytest -o addopts=-q -p metal_emulator.report \
		tests/test_metal_kernels.py tests/test_row_kernels.py tests/test_metal_coverage.py $(ARGS)

reference: $(VENV)/installed-test $(VENV)/installed-reference
	$(RUN) -m pytest -o addopts=-q tests/reference $(ARGS)
	$(RUN) -m pytest -m slow

# FLASHMOE_RECORD=folder keeps every request that the clients send.
clients: $(VENV)/installed-test $(addprefix .clients/,$(addsuffix /installed,npm aider lm_eval packages))
	$(RUN) -m pytest -o addopts=-q -m clients tests/clients $(ARGS)

clean:
	rm -rf $(VENV) .clients demo

# Environments. The project is installed in place, so that changes to it need no installation.

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("error: Python 3.10 or newer is needed, \
	but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@$(PYTHON) -c 'import platform, sys; (sys.platform, platform.machine()) == ("darwin", "x86_64") and \
	sys.exit("error: MLX needs a Python for Apple Silicon, but $(PYTHON) is for Intel processors; \
	name another: make PYTHON=/opt/homebrew/bin/python3 $(MAKECMDGOALS)")'
	@echo "Setting up $(VENV); the first time this takes a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '$(PROJECT)'
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	@$(PIP) --editable '$(call PROJECT_WITH,$*)'
	@touch $@

# Clients: those that cannot stand together are installed apart.

.clients/npm/installed: tests/clients/package.json
	@mkdir -p $(@D)
	@cp $< $(@D)
	npm install --prefix $(@D) --no-fund --no-audit --loglevel error
	@touch $@

.clients/%/installed: tests/clients/requirements/%.txt
	@$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
