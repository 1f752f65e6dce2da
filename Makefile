# PYTHON=  an existing environment's python to use instead of .venv
# TORCH_INDEX=  another package index for torch, e.g. PyTorch's CPU index for a small install
BASE_PYTHON ?= python3
PYTHON ?= .venv/bin/python
TORCH_INDEX ?=
READY = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.ready)

.PHONY: demo test proof faults lint bench gpu clean

demo: $(READY)
	$(PYTHON) -m tools.demo

test: $(READY)
	$(PYTHON) -m pytest tests -m "not proof" -q --durations=15

proof: $(READY)
	$(PYTHON) -m pytest tests -m proof -q --durations=0

faults: $(READY)
	$(PYTHON) -m tests.faults

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check -q .
	$(PYTHON) -m compileall -q configs data models tools benchmarks tests main.py save_logits.py utils.py logger.py lr_scheduler.py hubconf.py

bench: $(READY)
	for name in model augment listing store saving distill; do $(PYTHON) -m benchmarks.$$name || exit 1; done

gpu: $(READY)
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf .venv build .pytest_cache .ruff_cache

.venv/.ready: requirements.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(BASE_PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),.venv/bin/python -m pip install --disable-pip-version-check -q --index-url $(TORCH_INDEX) torch torchvision)
	.venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@
