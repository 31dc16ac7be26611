# Two commands are all that is needed from a fresh clone: `make run` and `make test`.
PYTHON ?= python3
# Test processes at a time; more of them than cores make deadlines come near.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The lowest supported protobuf tools: generated code refuses runtimes older than the tools that made it.
PROTO_TOOLS := grpcio-tools==1.72.1
PROTO_VENV := .venv-proto
GENERATED := proto/loscar_wire/_generated
# Compose v2 where it is, else docker-compose 1.29; COMPOSE_FILE may name overlays too: deploy/compose.yaml:deploy/…
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
up down: export COMPOSE_FILE ?= deploy/compose.yaml
up down: export COMPOSE_PROJECT_NAME ?= loscar

.PHONY: run test test-long up down compose-test docs bench convergence chaos fuzz schedules soak load loadtest claims lint types proto clean

run: $(VENV)/worker.stamp
	$(BIN)/loscar run $(ARGS)

test: $(VENV)/dev.stamp $(PROTO_VENV)/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not long" --numprocesses $(JOBS) --dist worksteal $(ARGS)

# What `make test` leaves out, for its length: a browser, Ray, systemd, Slurm, plans against real runs, pages' commands.
test-long: $(VENV)/long.stamp
	$(BIN)/python -m pytest -m long $(ARGS)

# A server and workers in containers: see docs/deploy.md. With ARGS=-v `down` removes the volumes too.
up:
	$(COMPOSE) up --build --detach $(ARGS)

down:
	$(COMPOSE) down $(ARGS)

# Real containers, for some minutes; without an engine that can be used it says so.
compose-test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/compose $(ARGS)

# The documentation as a site, in site/; warnings are errors.
docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict $(ARGS)

# About fifty minutes, one after the other, since they measure; fetches a9a when it is not in the data folder.
bench: $(VENV)/bench.stamp
	status=0; for script in cli_start.py session_overhead.py training_thread.py training_throughput.py goodput.py \
		averaging.py "averaging.py --params 250e3 --rounds 100" link_payload.py wire.py topk.py shards.py presence.py \
		main_job.py "a9a.py --download"; do \
		$(BIN)/python benchmarks/$$script || status=1; done; $(BIN)/python benchmarks/summary.py; exit $$status

# Loss for each byte of every value type and selection; CIFAR-10 has to be in the data folder. A quarter of an hour.
convergence: $(VENV)/dev.stamp
	status=0; for task in digits "cifar10 --seeds 0,1"; do \
		$(BIN)/python benchmarks/convergence.py --task $$task $(ARGS) || status=1; done; exit $$status

# A run whose processes and links fail for a minute, and its audit; five seeds, about three minutes each.
chaos: $(VENV)/worker.stamp
	$(BIN)/python benchmarks/chaos.py $(ARGS)

# A million conversations with the server; guided by coverage where atheris has a wheel for this Python.
fuzz: $(VENV)/fuzz.stamp
	$(BIN)/python tests/fuzz --out benchmarks/results/fuzz.json $(ARGS)

# Far more random schedules of the state machines than the suite runs.
schedules: $(VENV)/dev.stamp
	PYTHONPATH=tests/core:tests/support:benchmarks $(BIN)/python -P benchmarks/schedules.py $(ARGS)

# A hundred thousand rounds with workers that come and go; half an hour on a machine that does nothing else.
soak: $(VENV)/worker.stamp
	$(BIN)/python benchmarks/soak.py $(ARGS)

# What a round costs with up to 256 synthetic workers; ten minutes.
load: $(VENV)/worker.stamp
	$(BIN)/python benchmarks/load.py $(ARGS)

# The compose stack over slow and lossy links; five minutes beside the images. Root, and a container engine.
loadtest: $(VENV)/dev.stamp
	PYTHONPATH=tests/compose:benchmarks $(BIN)/python -P benchmarks/compose_load.py $(ARGS)

# What the paper claims, tried on real data; some hours, so that each can also be run alone.
claims: $(VENV)/worker.stamp
	status=0; for script in benchmarks/claim_*.py; do $(BIN)/python $$script || status=1; done; exit $$status

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

proto: $(PROTO_VENV)/stamp
	$(PROTO_VENV)/bin/python proto/generate.py $(GENERATED)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("loscar needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/worker.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[worker]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/worker.stamp

$(VENV)/long.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(VENV)/bench.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]' \
		&& touch $@ || echo 'torchft cannot be installed here: it will be missing from the comparison' >&2
	touch $(VENV)/dev.stamp $(VENV)/worker.stamp

$(VENV)/fuzz.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --only-binary atheris --editable '.[fuzz]' \
		&& touch $@ || echo 'atheris cannot be installed here: mutations from a seed instead' >&2

$(PROTO_VENV)/stamp: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet '$(PROTO_TOOLS)' 'setuptools<81'
	touch $@

clean:
	rm -rf $(VENV) $(PROTO_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
