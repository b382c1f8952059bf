# `make run` and `make test` set everything up by themselves; see scripts/setup.sh for TORCH and PYTHON.
# ARGS goes on to the program: make run ARGS="--steps 50", make test ARGS="-m slow -k resume".

# JOBS is the number of processes that the tests run in.

ARGS ?=
JOBS ?= 2
export TORCH PYTHON HASHES

.PHONY: run test lint format bench results docs audit install-hashed constraints help

run: ## train the recommended method on the embedded corpus, and plain training beside it
	@scripts/setup.sh run
	.venv/bin/curriq train --preset recommended --against uniform $(ARGS)

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

audit: ## look every pinned version up among the known vulnerabilities (needs pypi.org)
	@scripts/setup.sh dev
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[audit]'
	.venv/bin/python -m pip_audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

install-hashed: HASHES = 1
install-hashed: ## set up what `make test` needs, each library checked against constraints-hashes.txt
	@scripts/setup.sh dev

constraints: ## renew constraints.txt and constraints-hashes.txt (needs uv)
	uv pip compile --universal --all-extras --python-version 3.11 --upgrade --upgrade-package torch==2.13.0 \
		--no-emit-index-url --no-emit-find-links --quiet --output-file constraints.txt pyproject.toml
	$(MAKE) --no-print-directory constraints-hashes.txt

# Without torch and what it brings: its build depends on the machine, and the CPU build is in another index.
constraints-hashes.txt: constraints.txt
	uv pip compile --universal --extra dev --extra report --python-version 3.11 --constraint constraints.txt \
		--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --quiet \
		--custom-compile-command 'make constraints-hashes.txt' --output-file constraints-hashes.txt \
		$$(grep -oE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==' constraints.txt | tr -d = \
			| sed 's/^/--no-emit-package /') pyproject.toml

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
