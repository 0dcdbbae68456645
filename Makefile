# `make demo` and `make test` set up everything themselves. Variables: SEED=n, METHOD=rloo (or grpo) and REDO=1 for demo, PYTEST_ARGS=... for test,
# PYTHON=... for the first set-up, LOCK_ARGS=--upgrade for lock.

python := .venv/bin/python
UV ?= uv

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint style venv docs lock clean

help: ## say what each target does
	@sed -n 's/^\([a-z.-]*\):[^#]*## /  make \1	/p' Makefile

demo_name := demo$(if $(METHOD),-$(METHOD))$(if $(SEED),-seed-$(SEED))
demo: venv ## all three RLHF steps on the CPU, in minutes; SEED=n for another seed, METHOD=rloo or grpo in place of PPO, REDO=1 to start over
	$(python) -m rlhf_train --job demo --step all --run $(demo_name) $(if $(SEED),--set seed=$(SEED)) \
		$(if $(METHOD),--set ppo.advantage=$(METHOD) --set ppo.samples_per_prompt=4) $(if $(REDO),--redo)

test: style ## ruff, then every test, mypy among them; PYTEST_ARGS='-k gae' for some
	$(python) -m pytest $(PYTEST_ARGS)

test-fast: venv ## tests that need no torch and start nothing, in under a minute: the job file, the views, most of the laptop half
	$(python) -m pytest --fast tests/jobs tests/env tests/remote tests/test_house.py $(PYTEST_ARGS)

lint: style ## ruff and mypy
	$(python) -m mypy

style: venv ## ruff
	$(python) -m ruff check
	$(python) -m ruff format --check

venv: ## .venv with everything, made once (some minutes) and kept up to date
	@sh env/venv.sh

docs: venv ## write docs/job-file.md from the fields of jobs/spec.py, and the table of families in docs/models-and-data.md
	$(python) -m jobs.job_file_page >docs/job-file.md
	$(python) -m jobs.families_table

.env: ## who you are, for docker compose, and the folders that it mounts; once
	@sh docker/dotenv.sh

# torch stays out of a lock: which build of it is wanted, and from where, is said beside (torch-*.txt, env/venv.sh).
compile := $(UV) pip compile --quiet --no-python-downloads --generate-hashes --custom-compile-command "make lock" $(LOCK_ARGS)
pinned := --python-version 3.10 --python-platform x86_64-manylinux_2_28
modern := --python-version 3.12 --python-platform x86_64-manylinux_2_28
lock: ## write the locks of env/pins anew from their .in files and pyproject.toml (needs uv: pip install uv)
	$(compile) --universal --python-version 3.10 --no-emit-package torch --excludes env/pins/cpu.excludes --extra train --extra laptop \
		--output-file env/pins/cpu.txt pyproject.toml env/pins/cpu.in
	$(compile) $(pinned) --no-emit-package torch --excludes env/pins/cu118.excludes --extra train \
		--output-file env/pins/cu118.txt pyproject.toml env/pins/cu118.in
	$(compile) $(modern) --constraint env/pins/cpu.txt --no-emit-package torch --excludes env/pins/cu130.excludes --extra train \
		--output-file env/pins/cu130.txt pyproject.toml env/pins/cu130.in
	$(compile) $(modern) --constraint env/pins/cu130.txt --output-file env/pins/torch-cu130.txt env/pins/torch-cu130.in
	$(compile) $(pinned) --output-file env/pins/pip.txt env/pins/pip.in
	$(compile) --universal --python-version 3.10 --output-file env/pins/uv.txt env/pins/uv.in
	$(compile) $(pinned) --no-deps --output-file env/pins/torch-ci.txt env/pins/torch-ci.in
	$(compile) $(pinned) --constraint env/pins/cu118.txt --output-file env/pins/cu118-test.txt env/pins/cu118-test.in
	$(compile) $(modern) --constraint env/pins/cu130.txt --output-file env/pins/cu130-test.txt env/pins/cu130-test.in
	$(compile) --universal --python-version 3.10 --extra laptop --output-file env/pins/laptop.txt pyproject.toml env/pins/laptop.in

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv.lock .mypy_cache .pytest_cache .ruff_cache build rlhf_box.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
