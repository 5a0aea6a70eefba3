# `make help` says what there is. Needs GNU make, a POSIX shell and Python 3.11 or newer.

.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := .venv
STAMP := $(VENV)/.complete
PYTHON ?=
TORCH_INDEX ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
# Two processes for the tests, a file at a time in the order of the folders: the long files are among the first.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)")

# An environment that was never finished (killed half-way), was moved here from elsewhere, or has lost its interpreter holds
# no stamp worth trusting: it is made anew. The stamp's text is the folder that the environment was made in.
ifneq ($(shell test -x $(VENV)/bin/python && $(VENV)/bin/python -c '' 2>/dev/null && cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help train test test-all bench setup horovod horovod-if-possible check clean

help:
	@echo "make train     set up, then distil a small teacher into a student on text found on this machine (minutes on 2 cores)"
	@echo "make test      set up, then lint, check types, build Horovod where that is possible and run the tests (all but those"
	@echo "               marked slow)"
	@echo "make test-all  the same with the slow tests"
	@echo "make bench     set up, then run the microbenchmarks"
	@echo "make setup     only the set-up: $(VENV) with the versions of constraints.txt, and fastdistil itself, editable"
	@echo "make horovod   set up, then build Horovod for the installed torch, for engine: horovod (about 3 minutes on 2 cores, once:"
	@echo "               the wheel is kept in ~/.cache/fastdistil; needs g++, cmake and, for MPI, mpicc)"
	@echo "make clean     remove $(VENV), caches and build products (runs/ stays)"
	@echo ""
	@echo "PYTHON=...       the Python that $(VENV) is made from; without it the first one of at least 3.11 among python3,"
	@echo "                 python3.13, python3.12 and python3.11"
	@echo "TORCH_INDEX=URL  one more package index, searched when packages are installed. PyTorch comes from the index that pip"
	@echo "                 is configured with, and its default build there carries CUDA (several GB); on a machine without"
	@echo "                 a GPU give the URL of an index with CPU builds (about 200 MB). To change builds: make clean first."

setup: $(STAMP)
	@echo "fastdistil: $(VENV) is ready"

# Stale (setup.py, pyproject.toml or constraints.txt changed): pip brings the environment up to date in place.
# Untrusted (see above) or absent: from nothing. The stamp goes first and comes back last.
$(STAMP): setup.py pyproject.toml constraints.txt
	@set -e; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && $(VENV)/bin/python -c '' 2>/dev/null; then \
		echo "fastdistil: the requirements changed; updating $(VENV)"; \
		rm -f $(STAMP); \
	else \
		found=""; too_old=""; no_venv=""; \
		for candidate in $(CANDIDATES); do \
			version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
			if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
				too_old="$$too_old $$candidate ($$version)"; \
			elif ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then \
				no_venv="$$candidate ($$version)"; \
			else \
				found="$$candidate"; break; \
			fi; \
		done; \
		if [ -z "$$found" ] && [ -n "$$no_venv" ]; then \
			echo "fastdistil: $$no_venv cannot make virtual environments; install that part of it" \
				"(Debian, Ubuntu: apt install python3-venv) and run make again" >&2; \
			exit 2; \
		elif [ -z "$$found" ]; then \
			echo "fastdistil: wanted Python 3.11 or newer, looked for: $(CANDIDATES); found:$${too_old:- none};" \
				"install one, or name yours: make PYTHON=/path/to/python3" >&2; \
			exit 2; \
		fi; \
		[ ! -e $(VENV) ] || echo "fastdistil: $(VENV) is incomplete or was made elsewhere; making it anew"; \
		rm -rf $(VENV); \
		echo "fastdistil: making $(VENV) with $$found ($$version)"; \
		"$$found" -m venv $(VENV); \
	fi
	@echo "fastdistil: installing the versions of constraints.txt into $(VENV) (PyTorch is the large one; minutes the first time)"
	@# Without build isolation, so that the build uses the pinned setuptools too and nothing is downloaded twice.
	@$(PIP_INSTALL) --quiet setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev,tensorboard,horovod]'
	@echo "$(CURDIR)" > $(STAMP)

train: $(STAMP)
	$(VENV)/bin/fastdistil train demo

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

horovod: $(STAMP)
	@$(VENV)/bin/python -m fastdistil.install.horovod_build --constraint constraints.txt

# Exit 2: something that building needs is not here; it has said what.
horovod-if-possible: $(STAMP)
	@$(VENV)/bin/python -m fastdistil.install.horovod_build --constraint constraints.txt || { \
		code=$$?; \
		[ $$code -eq 2 ] || exit $$code; \
		echo "fastdistil: going on; without Horovod the tests that need it are skipped"; \
	}

test: check horovod-if-possible
	$(VENV)/bin/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

test-all: check horovod-if-possible
	$(VENV)/bin/python -m pytest $(SIDE_BY_SIDE)

bench: $(STAMP)
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage
	find fastdistil kernels profiling benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
