# Everything a contributor runs. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

python := .venv/bin/python
pytest := $(python) -m pytest -q --no-header
# The rings of `make test`, quickest first.
rings := lint unit golden deploy packet bench behaviour
# The committed runs, in the order they are told in docs/benchmarks.md.
runs = $(wildcard $(patsubst %,docs/benchmarks/%.json,path path-6 path-xdp path-100000 path-100000-um path-vm \
	apply-ebpf apply-ebpf-100000 apply-nftables apply-ipvs apply-ipvs-100000 apply-iptables apply-userspace packet packet-vm maglev))
# What `make image` installs, and nothing else needs.
builders := buildah mmdebstrap crun
# What `make vm` installs, and nothing else needs.
emulator := qemu-system-x86 busybox-static kmod e2fsprogs
# And to build kernels that run as a process.
kernel_builders := gcc make libc6-dev flex bison bc xz-utils
# Where `make real` builds what it runs beside.
KUBERNETES ?= /var/lib/ebpf-svc-kubernetes
# make behaviour K=nodeport ARGS=-x
K ?=
ARGS ?=
JSON ?=
slowest := --durations=25 --durations-min=5
# Whole runs use every processor, of many four: there are few variants to share out.
abreast := -n auto --maxprocesses 4
choose = $(if $(K),-k '$(K)') $(ARGS)

.PHONY: help bootstrap demo test $(rings) image vm real behaviours behaviour-page benchmarks bench-counts bench-path bench-packet bench-apply bench-watch bench-maglev clean need-root

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22
	@echo
	@echo "  K=word chooses tests by name, ARGS=... goes to the command, JSON=path keeps a benchmark's samples."

bootstrap: ## install what is missing: Debian packages, .venv (root, when something is missing)
	@scripts/bootstrap

demo: need-root bootstrap ## the tour: a small cluster on this machine, every kind of service (root)
	@.venv/bin/ebpf-svc demo $(ARGS)

test: need-root bootstrap ## every ring, with the time each took (root)
	@failed=; times=; \
	for ring in $(rings); do \
		echo "== $$ring"; begun=$$SECONDS; \
		$(MAKE) --no-print-directory $$ring || failed="$$failed $$ring"; \
		times="$$times  $$ring $$((SECONDS - begun)) s"; \
	done; \
	echo "== times:$$times"; \
	if [ -n "$$failed" ]; then echo "== failed:$$failed"; exit 1; fi; \
	echo "== all rings passed"

lint: bootstrap ## style, types, import layers
	@failed=; \
	.venv/bin/ruff check --quiet --output-format concise . || failed=1; \
	.venv/bin/ruff format --quiet --check . || failed=1; \
	.venv/bin/mypy --no-error-summary || failed=1; \
	layers=$$(.venv/bin/lint-imports --no-cache) || { echo "$$layers"; failed=1; }; \
	[ -z "$$failed" ] && echo "ruff, mypy and import-linter have nothing to say"

unit: bootstrap ## pure parts; no root, seconds
	@$(pytest) tests/unit $(choose)

golden: bootstrap ## manifests against the expected plan; no root (ARGS=--update rewrites)
	@$(pytest) tests/golden $(choose)

deploy: bootstrap ## manifests and image file against schema, rights and settings; no root
	@$(pytest) tests/deploy -m 'not slow' $(choose)

image: need-root bootstrap ## build the image without a registry and run it (root, buildah, mmdebstrap)
	@dpkg-query -W $(builders) >/dev/null 2>&1 || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(builders) >/dev/null; }
	@$(pytest) tests/deploy -m slow $(choose)

packet: need-root bootstrap ## one program at a time through the kernel (root)
	@$(pytest) tests/packet $(choose)

behaviour: need-root bootstrap ## whole agents in a cluster of network namespaces (root)
ifneq ($(strip $(choose)),)
	@$(pytest) tests/behaviour $(choose)
else
	@$(pytest) tests/behaviour $(abreast) $(slowest) --results test-logs/results/behaviour.json || { \
		echo "== what failed, once more and alone"; \
		$(pytest) tests/behaviour --last-failed --last-failed-no-failures none; }
endif

vm: need-root bootstrap ## programs, packets, behaviours on other kernels, emulated or as a process (root, qemu)
	@dpkg-query -W $(emulator) $(kernel_builders) >/dev/null 2>&1 || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(emulator) $(kernel_builders) >/dev/null; }
	@$(python) -m tests.vm ring $(ARGS)

behaviours: behaviour behaviour-page ## docs/behaviours.md from a run of the behaviour ring and what the vm ring left (root)

behaviour-page: bootstrap ## docs/behaviours.md from what whole runs of both rings left, running nothing
	@$(python) -m tests.lib.behaviours docs/behaviours.md $$(find test-logs -path '*/results/*.json')

real: need-root bootstrap ## beside a kube-apiserver and a kube-proxy built from Debian's source: minutes (root)
	@scripts/kubernetes '$(KUBERNETES)'
	@EBPF_SVC_KUBERNETES='$(KUBERNETES)' $(pytest) tests/real $(choose)

bench: need-root bootstrap ## every benchmark, small, and counts that must not grow (root)
	@$(pytest) tests/bench $(choose)

bench-counts: need-root bootstrap ## writes, calls and instructions beside those recorded (root; ARGS=--update)
	@$(python) -m ebpf_svc.bench.counts tests/bench/counts.json $(ARGS)

benchmarks: bootstrap ## docs/benchmarks.md from the runs in docs/benchmarks/
	@.venv/bin/ebpf-svc bench report $(runs) --markdown docs/benchmarks.md

bench-path: need-root bootstrap ## connections, requests, throughput: every mode beside no Service at all (root)
	@.venv/bin/ebpf-svc bench path $(if $(JSON),--json '$(JSON)') $(ARGS)

bench-packet: need-root bootstrap ## nanoseconds per packet, beside an empty program (root)
	@.venv/bin/ebpf-svc bench packet $(if $(JSON),--json '$(JSON)') $(ARGS)

bench-apply: need-root bootstrap ## from a change to the kernel: time, writes, memory (root; MODE=nftables)
	@.venv/bin/ebpf-svc bench apply $(if $(MODE),--mode '$(MODE)') $(if $(JSON),--json '$(JSON)') $(ARGS)

bench-watch: need-root bootstrap ## from an API server to the maps: lists, events, memory (root)
	@.venv/bin/ebpf-svc bench watch $(if $(JSON),--json '$(JSON)') $(ARGS)

bench-maglev: bootstrap ## Maglev tables: time, balance, what a removal moves
	@.venv/bin/ebpf-svc bench maglev $(if $(JSON),--json '$(JSON)') $(ARGS)

clean: ## remove what builds and tests left in this folder, not .venv
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist test-logs
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

need-root:
	@if [ "$$(id -u)" != 0 ]; then \
		echo "make $(firstword $(MAKECMDGOALS)) needs root: it makes network namespaces and loads eBPF. sudo make $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi
