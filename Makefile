# Two commands do everything on a fresh machine: `make digits` and `make test`. Both can be run again.
PYTHON ?= python3.11

.PHONY: digits test quick lint clean

digits: .venv/installed
	.venv/bin/asr-kd run pipelines/digits
	@echo "report: runs/digits/report/report.html"

test: .venv/installed
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

# what a developer runs every few minutes: no whole jobs, no processes
quick: .venv/installed
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q -m "not slow"

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/mypy

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv runs
