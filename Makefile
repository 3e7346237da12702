# The two commands of the README. Each does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
# pip has its own setting for a folder of wheels; the installer used here is told of it.
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))

# PyTorch's CPU build is not on PyPI: from that folder, or from PyTorch's own index.
SERVE := .venv-serve
CPU_TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)

.PHONY: quickstart test lint lock photos clean

quickstart: $(VENV)/.quickstart runs/demo-data/truth.json
	$(BIN)/fusion run configs/quickstart.yaml

test: $(VENV)/.dev $(SERVE)/.done .photos
	$(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

runs/demo-data/truth.json: | $(VENV)/.quickstart
	$(BIN)/fusion demo-data runs/demo-data

$(VENV)/.build: requirements/build.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements/build.txt
	touch $@

$(VENV)/.quickstart: requirements/quickstart.txt pyproject.toml | $(VENV)/.build
	$(INSTALL) --require-hashes --no-deps -r requirements/quickstart.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: requirements/dev.txt requirements/mend_cpu.py $(VENV)/.quickstart
	$(INSTALL) $(CPU_TORCH) --require-hashes --no-deps -r requirements/dev.txt
	$(BIN)/python requirements/mend_cpu.py
	touch $@

# vLLM on the CPU, in an environment of its own (2.5 GB): its pins are many.
$(SERVE)/.done: requirements/serve-cpu.txt requirements/mend_cpu.py | $(VENV)/.build
	$(PYTHON) -m venv $(SERVE)
	$(BIN)/uv pip install --quiet --python $(SERVE)/bin/python --compile-bytecode $(CPU_TORCH) \
		--require-hashes --no-deps -r requirements/serve-cpu.txt
	$(SERVE)/bin/python requirements/mend_cpu.py
	touch $@

# Labelled photos that can be had offline, to measure on (tests/photos/README.md).
photos: .photos
.photos:
	bash tests/photos/fetch.sh

# Pin everything anew. Hashes, no addresses; one resolution, so that the two sets agree.
COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-emit-index-url \
	--no-emit-find-links --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
	--custom-compile-command "make lock" --upgrade
DEV_EXTRAS := faiss-cpu demo s3 transformers open-clip ultralytics paddleocr dev
lock: $(VENV)/.build
	$(COMPILE) requirements/build.in -o requirements/build.txt
	$(COMPILE) $(CPU_TORCH) --override requirements/cpu-without.txt \
		--override requirements/newer.txt pyproject.toml \
		requirements/dev.in $(foreach extra,$(DEV_EXTRAS),--extra $(extra)) -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra faiss-cpu --extra demo -c requirements/dev.txt \
		-o requirements/quickstart.txt
	$(COMPILE) $(CPU_TORCH) --override requirements/cpu-without.txt requirements/serve-cpu.in \
		-o requirements/serve-cpu.txt

clean:
	rm -rf $(VENV) $(SERVE) $(RUN) runs/demo-data .photos
