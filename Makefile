# `make run` and `make test` set everything up by themselves; see scripts/setup.sh for TORCH and PYTHON.
# ARGS goes on to the program: make run ARGS="--steps 50", make test ARGS="-m slow -k resume".

# JOBS is the number of processes that the tests run in.

ARGS ?=
JOBS ?= 2
export TORCH PYTHON

.PHONY: run test lint format bench results docs constraints help

run: ## train the recommended method on the embedded corpus
	@scripts/setup.sh run
	.venv/bin/curriq train --preset recommended $(ARGS)

test: ## run the default tier of the tests
	@scripts/setup.sh dev
	.venv/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: ## style, formatting and types
	@scripts/setup.sh dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/ty check

format: ## fix style and formatting in place
	@scripts/setup.sh dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: ## time the training step against plain training
	@scripts/setup.sh run
	.venv/bin/python benchmarks/step_time.py $(ARGS)

results: ## run every comparison that the documentation quotes (hours)
	@scripts/setup.sh dev
	.venv/bin/python experiments/results.py $(ARGS)

docs: ## build the documentation site into build/site; a warning is an error
	@scripts/setup.sh dev
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet

constraints: ## renew constraints.txt (needs uv)
	uv pip compile --universal --all-extras --python-version 3.11 --upgrade --upgrade-package torch==2.13.0 \
		--no-emit-index-url --no-emit-find-links --quiet --output-file constraints.txt pyproject.toml

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
