# `make demo` and `make test` do their own set-up; nothing else has to be typed.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format release-check clean

VENV := .venv
READY := $(VENV)/.ready
# Containers often forbid Python to keep what it compiled; then each of some hundred processes would compile it again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest
# What a worker runs out of, it takes from another. `--cov` comes last: it would take a path that follows for its value.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal $(if $(COVERAGE),--cov)

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(READY) ## Train, vet, serve and attack a small classifier; write guard-demo/report.html
	@$(VENV)/bin/guard demo

test: $(READY) ## Run unit and integration tests; T=tests/unit/cli or T="-k name" runs a part of them
	@$(PYTEST) $(if $(T),$(T),$(PARALLEL))

test-all: $(READY) ## Run all tests, those of minutes too
	@$(PYTEST) tests $(PARALLEL)

lint: $(READY) ## Check style and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(READY) ## Bring the code into form
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

release-check: $(READY) ## See whether this commit can be tagged v$(VERSION)
	@$(VENV)/bin/python scripts/release_check.py $(VERSION)

clean: ## Remove the environment and what the demo wrote
	rm -rf $(VENV) guard-demo

$(READY): pyproject.toml constraints.txt scripts/setup
	@scripts/setup $(VENV)
	@touch $@
