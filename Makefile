# Everything a fresh machine needs is Python >= 3.11, git and make. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# uv from the PATH where it is, else one of the project's own.
UV := $(shell command -v uv 2>/dev/null || echo .cache/uv/bin/uv)
export BENTOML_DO_NOT_TRACK := true
export MIEN_SHARED ?= ../shared
# Where the environment forbids bytecode, every process would compile torch anew: 5 s of CPU each.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.cache/pycache

.PHONY: help env demo demo-stop test lint format model shards proto bench soak accept train-local e2e image-serve image-train lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.cache/uv/bin/uv:
	python3 -m venv .cache/uv
	.cache/uv/bin/pip install --quiet uv

$(VENV)/.installed: requirements.lock pyproject.toml | $(filter .cache/%,$(UV))
	test -x $(BIN)/python || $(UV) venv --quiet --python '>=3.11,<3.14' $(VENV)
	$(UV) pip sync --quiet --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

env: $(VENV)/.installed ## the environment in .venv, exactly as requirements.lock has it

demo: env ## start the service on http://localhost:3000 and make the pictures in demo/
	$(BIN)/python -m serving.demo

demo-stop: ## stop the service that `make demo` started
	@$(BIN)/python -m serving.demo --stop

test: env ## every test that needs no cluster and no GPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: env ## ruff, mypy (strict in mien/), import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env ## let ruff put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

shards: env ## crops and shards in shards/ from the pictures in MIEN_SHARED; nobody who looks like a test face is trained on
	test -e shards/lfw/manifest.json || $(BIN)/python -m services.ingest --config services/ingest/configs/lfw.yaml --out shards/lfw
	test -e shards/faces/manifest.json || $(BIN)/python -m services.ingest --config services/ingest/configs/shared.yaml \
		--exclude-like shards/lfw --judge-weights $(MIEN_SHARED)/weights --out shards/faces

model: shards ## shards -> the model that ships, models/mien-128: minutes on CPUs for the fit, ten on a GPU for its painter
	$(BIN)/python -m training.fit --config training/configs/fit/mien-128.yaml export=models/fitted
	$(BIN)/python -m training --config training/configs/mien-128.yaml start=models/fitted export=models/mien-128

proto: env ## the gRPC messages and stubs in mien/v1 from serving/proto
	$(BIN)/python -m grpc_tools.protoc -I serving/proto --python_out=. --pyi_out=. --grpc_python_out=. mien/v1/face_identity.proto

bench: env ## the benchmarks, as ratios measured in one run; writes bench/*.json
	for name in serving ingest streaming video; do test ! -e bench/$$name.py || $(BIN)/python -m bench.$$name; done
	$(BIN)/python -m bench.scale --write docs/scale.md

soak: env ## the acceptance runs of minutes that `make test` skips
	MIEN_SOAK=1 $(BIN)/python -m pytest -m soak --timeout 3600

accept: env ## the service's acceptance runs, one after the other: half an hour of a quiet machine (bench/acceptance.py)
	$(BIN)/python -m bench.acceptance

train-local: env ## the whole chain, small: S3 server, MLflow server, ingest, training in 2 processes, evaluate, promote
	$(BIN)/python -m training.local

e2e: env ## the chart and the jobs against the cluster of the current kubeconfig
	$(BIN)/python -m tests.e2e

image-serve: ## container image of the service
	serving/build.sh

image-train: ## container image of training and the services
	training/build.sh

lock: env ## pin every package again (after a change of pyproject.toml)
	$(UV) pip compile --quiet --universal --all-extras --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' pyproject.toml -o requirements.lock

clean: ## remove what make made, but not runs and shards
	rm -rf $(VENV) .cache demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
