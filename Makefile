# Every target sets up what it needs: a virtual environment in .venv with the locked versions. Set PYTHON to choose another interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# What the demo makes lies here: data, trained experts, S3 server, artifacts, Prefect and MLflow databases.
DEMO := $(CURDIR)/.ota

# ARGS: options of the command behind the target, for example ARGS="--sizes 0.1 --runs 1" for bench, ARGS="--free-ports" for stack.
.PHONY: demo study study-real stack stack-down bench docs test test-slow test-gpu chaos check lines format clean

demo: $(READY)
	mkdir -p $(DEMO)/prefect
	OTA_HOME=$(DEMO) PREFECT_HOME=$(DEMO)/prefect $(BIN)/ota demo

# The paper's tables on the demo's experts, three seeds of them; what is trained and merged is kept. Rewrites docs/results.md.
study: $(READY)
	mkdir -p $(DEMO)/prefect
	OTA_HOME=$(DEMO) PREFECT_HOME=$(DEMO)/prefect $(BIN)/ota study deployments/studies/demo.yaml --demo --write docs/results.md $(ARGS)

# The same on a real language model, SmolLM2-135M, in two settings of the training: some hours on two cores. Rewrites docs/results/real*.md.
study-real: $(READY)
	mkdir -p $(DEMO)/prefect
	OTA_HOME=$(DEMO) PREFECT_HOME=$(DEMO)/prefect $(BIN)/ota study-real --write docs/results/real.md $(ARGS)
	OTA_HOME=$(DEMO) PREFECT_HOME=$(DEMO)/prefect $(BIN)/ota study-real deployments/studies/real-long.yaml --write docs/results/real-long.md $(ARGS)

# Prefect, MLflow, S3 and two workers, in the background; their data lie in $(DEMO)/stack.
stack: $(READY)
	$(BIN)/ota stack up --home $(DEMO) $(ARGS)

stack-down: $(READY)
	$(BIN)/ota stack down --home $(DEMO) $(ARGS)

bench: $(READY)
	$(BIN)/ota bench --out $(DEMO)/bench $(ARGS)

# The manual as a site in .ota/site, which needs no network: open .ota/site/index.html. Rewrites docs/commands.md from the command itself.
docs: $(READY)
	$(BIN)/python docs/site/manual.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

# File by file in their order: the long ones of tests/flows first, many short ones last, so that both processes end together.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Where torch sees a GPU: its own tests, and those of the engine with the GPU as their device.
test-gpu: $(READY)
	OTA_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "not slow" tests/ota_core

# Kills commands at random moments and at every commit point, runs them again and compares; ARGS="--kills 500 --seed 1 --only merge,compress".
chaos: $(READY)
	$(BIN)/python -m tests.chaos $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# How large this is: lines of the product and of its tests.
lines:
	@for part in ota_core tasks flows "ota_core tasks flows" tests; do \
	  printf '%6d  %s\n' "$$(find $$part -name '*.py' -exec cat {} + | wc -l)" "$$part"; done

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	test ! -e $(DEMO)/stack/stack.json -o ! -x $(BIN)/ota || $(BIN)/ota stack down --home $(DEMO)
	rm -rf .venv .ota build *.egg-info

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON to one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)
