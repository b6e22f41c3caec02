# `make` alone lists the targets. Each is a line that a person could type.
PYTHON ?= python3
VENV := .venv
# called as `python -m ...`: scripts hold the full path of this folder, which may be renamed or odd
BIN := $(VENV)/bin
LOCKED := --quiet --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host \
    --no-emit-find-links --no-header --upgrade

.DEFAULT_GOAL := help
.PHONY: help run run-cluster test bench torture screenshots lint format lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.run ## start the service on 127.0.0.1:8080 (or $PORT), with an embedded PostgreSQL
	@exec $(BIN)/python -m datapipe serve --try-out

run-cluster: $(VENV)/.cluster ## start three NATS servers, one PostgreSQL and two services, on 8080 and 8081
	@exec $(BIN)/python tools/run-cluster

test: $(VENV)/.test ## install what the tests need, and run all of them
	@./tools/test-needs
	@$(BIN)/python -m compileall -q datapipe  # or each process does, where none may write
	$(BIN)/python -m pytest -n 5 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test ## ruff, mypy and bandit
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy datapipe
	$(BIN)/python -m bandit -q -c pyproject.toml -r datapipe

bench: $(VENV)/.test ## measure against bare aiohttp, bare COPY and what people run instead, as ratios
	@PYTHON=$(PYTHON) ./tools/bench-needs
	$(BIN)/python -m benchmarks

torture: $(VENV)/.test ## the long fault run: kills, an outage, hostile bodies and heads, a cluster, databases, what changes (over two hours)
	@./tools/test-needs
	$(BIN)/python -m tests.fault.torture

screenshots: $(VENV)/.test ## take the pictures of the docs anew (some 10 minutes)
	@./tools/test-needs chromium
	$(BIN)/python -m tests.browser.screenshots

format: $(VENV)/.test ## let ruff format and fix what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

lock: $(VENV)/.test ## write the locks anew: every version and hash that a deployment gets
	$(BIN)/python -m pip install --quiet 'pip-tools >= 7.4'
	$(BIN)/python -m piptools compile $(LOCKED) --extra mysql --extra nats -o requirements.txt setup.cfg
	$(BIN)/python -m piptools compile $(LOCKED) --all-build-deps --only-build-deps --allow-unsafe \
	    -o deploy/requirements-build.txt pyproject.toml

clean: ## remove the virtual environment, caches and everything that was stored
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info var

$(VENV)/.run: setup.cfg
	@PYTHON=$(PYTHON) ./tools/make-venv $(VENV) embedded
	@touch $@

$(VENV)/.cluster: setup.cfg
	@PYTHON=$(PYTHON) ./tools/make-venv $(VENV) cluster
	@touch $@ $(VENV)/.run

$(VENV)/.test: setup.cfg
	@PYTHON=$(PYTHON) ./tools/make-venv $(VENV) test,lint
	@touch $@ $(VENV)/.run $(VENV)/.cluster
