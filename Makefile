# Two targets that need nothing but Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
# The torch to install first; TORCH=torch takes whatever wheel pip chooses (CUDA wheels on Linux and Windows).
TORCH ?= torch==2.13.0
STAMP := .venv/.installed

.PHONY: demo test

demo: $(STAMP)
	.venv/bin/python -m esper.train --config configs/demo.json

test: $(STAMP)
	.venv/bin/python -m pytest -n auto tests property_tests

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH)
	.venv/bin/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)
