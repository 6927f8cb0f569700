# Every target sets up what it needs: a virtual environment in .venv with the locked versions. Set PYTHON to choose another interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Tools that lock, list and audit lie in an environment of their own, so that they are none of what they look at.
TOOLS := .venv/supply/.ready
# What the demo makes lies here: data, trained experts, S3 server, artifacts, Prefect and MLflow databases.
DEMO := $(CURDIR)/.ota

# ARGS: options of the command behind the target, for example ARGS="--sizes 0.1 --runs 1" for bench, ARGS="--free-ports" for stack.
.PHONY: demo study study-real stack stack-down bench docs test test-slow test-gpu chaos check lines lock sbom audit format clean

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

# What is installed, of which versions and files: CONTRIBUTING.md says more. ARGS="--upgrade-package NAME" for a newer version.
lock: $(TOOLS)
	.venv/supply/bin/python infra/supply/lock.py $(ARGS)

# The packages that run, with their licences, and as CycloneDX in .ota/sbom.json; fails where a licence is none of those that may be in there.
sbom: $(READY) $(TOOLS)
	mkdir -p $(DEMO)
	.venv/supply/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file $(DEMO)/environment.json $(BIN)/python
	$(BIN)/python infra/supply/licences.py $(DEMO)/environment.json $(DEMO)/sbom.json

# Known faults of the locked versions. Without a network it says so and fails.
audit: $(TOOLS)
	.venv/supply/bin/python infra/supply/audit.py $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	test ! -e $(DEMO)/stack/stack.json -o ! -x $(BIN)/ota || $(BIN)/ota stack down --home $(DEMO)
	rm -rf .venv .ota build *.egg-info

# Every file that is installed is one that the locks name by its SHA-256. What has no wheel is built by the locked setuptools, which comes first.
HASHED := install --quiet --disable-pip-version-check --no-deps --require-hashes
# Of torch's two builds the one without CUDA is taken where pip finds it, in PyTorch's index or a folder of wheels; else that of the package index.
CUDA = $$(ls -d .venv/lib/python*/site-packages/torch-*+cpu.dist-info >/dev/null 2>&1 || test $$(uname) != Linux || echo --requirement infra/requirements-cuda.lock)
$(READY): requirements.lock requirements-dev.lock infra/requirements-cuda.lock infra/requirements-torch-cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON to one")'
	$(PYTHON) -m venv .venv
	sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/setuptools.lock
	$(BIN)/python -m pip $(HASHED) --requirement .venv/setuptools.lock
	@$(BIN)/python -m pip $(HASHED) --requirement infra/requirements-torch-cpu.lock \
	  || echo "pip finds no torch without CUDA: that of the package index is installed, on Linux with the libraries of CUDA, some GB"
	$(BIN)/python -m pip $(HASHED) --no-build-isolation --requirement requirements.lock --requirement requirements-dev.lock $(CUDA)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

$(TOOLS): infra/supply/requirements.lock
	$(PYTHON) -m venv .venv/supply
	.venv/supply/bin/python -m pip $(HASHED) --only-binary :all: --requirement infra/supply/requirements.lock
	touch $(TOOLS)
