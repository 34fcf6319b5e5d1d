# Two commands do everything on a fresh machine: `make digits` and `make test`. Both can be run again.
VENV = .venv
PYTHONS = python3.13 python3.12 python3.11
# the newest that starts and can make a virtual environment: pyenv's shims have the name and may not run, Debian's lack ensurepip
starts = $(shell $(1) -c 'import ensurepip, venv' >/dev/null 2>&1 && echo $(1))
# a folder that is there keeps its Python; to ask for another is a mistake
version = $(shell $(1) -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)
ifdef PYTHON
ifneq ($(wildcard $(VENV)/bin/pip),)
ifneq ($(call version,$(PYTHON)),$(call version,$(VENV)/bin/python))
$(error $(VENV) holds Python $(call version,$(VENV)/bin/python), not $(PYTHON); remove that folder, or name another one with VENV=FOLDER)
endif
endif
endif
PYTHON ?= $(firstword $(foreach name,$(PYTHONS),$(call starts,$(name))))
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: digits test quick lint lock clean

digits: $(VENV)/user
	$(VENV)/bin/asr-kd run pipelines/digits
	@echo "report: runs/digits/report/report.html"

test: $(VENV)/developer
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

# what a developer runs every few minutes: no whole jobs, no processes
quick: $(VENV)/developer
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -q -m "not slow"

lint: $(VENV)/developer
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# both locks anew, for all Pythons and platforms; versions stay where they may. A user has the curves and the pictures too. The second holds what the first does not.
lock: $(VENV)/developer
	$(VENV)/bin/uv pip compile $(UNIVERSAL) --extra report --extra tensorboard pyproject.toml -o requirements.lock
	$(VENV)/bin/uv pip compile $(UNIVERSAL) --extra dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	grep -vxFf requirements.lock requirements-dev.lock >requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock
UNIVERSAL = -q --universal --python-version 3.11 --no-annotate --no-header

$(VENV)/bin/pip:
	@if ! $(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	  echo "$(or $(PYTHON),no Python found): asr-kd needs Python 3.11, 3.12 or 3.13 with its module venv; install one, or name it: make PYTHON=/path/to/python" >&2; \
	  exit 2; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/user: requirements.lock pyproject.toml | $(VENV)/bin/pip
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps -e .
	touch $@

$(VENV)/developer: requirements-dev.lock $(VENV)/user
	$(PIP) install -r requirements-dev.lock
	touch $@

clean:
	rm -rf $(VENV) runs
