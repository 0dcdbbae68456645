# `make demo` and `make test` set up everything themselves. Variables: SEED=n and REDO=1 for demo, PYTEST_ARGS=... for test,
# PYTHON=... for the first set-up, LOCK_ARGS=--upgrade for lock.

python := .venv/bin/python
UV ?= uv

.DEFAULT_GOAL := help
.PHONY: help demo test lint venv lock clean

help: ## say what each target does
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1	/p' Makefile

demo: venv ## all three RLHF steps on the CPU, in minutes; SEED=n for another seed, REDO=1 to start over
	$(python) -m rlhf_train --job demo --step all $(if $(SEED),--set seed=$(SEED) --run demo-seed-$(SEED)) $(if $(REDO),--redo)

test: lint ## lint, then every test; PYTEST_ARGS='-k gae' for some
	$(python) -m pytest $(PYTEST_ARGS)

lint: venv ## ruff and mypy
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy

venv: ## .venv with everything, made once (some minutes) and kept up to date
	@sh env/venv.sh

lock: ## write env/pins/cpu.txt anew from cpu.in and pyproject.toml (needs uv: pip install uv)
	$(UV) pip compile --quiet --universal --python-version 3.10 --no-python-downloads --generate-hashes --no-emit-package torch \
		--excludes env/pins/cpu.excludes --extra train --custom-compile-command "make lock" $(LOCK_ARGS) \
		--output-file env/pins/cpu.txt pyproject.toml env/pins/cpu.in

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv.lock .mypy_cache .pytest_cache .ruff_cache build rlhf_box.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
