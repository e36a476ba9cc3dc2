# make demo | make page | make bench | make export | make soak | make test | make lint: each sets up .venv in this checkout first, and reuses it while it is up to date.
PYTHON ?= python3
VENV := .venv
JOBS ?= 2
# The pocket model: llava-1.5 or qwen2.5-vl.
FAMILY ?= llava-1.5
# The port of make page.
PORT ?= 8600
# For make soak: 30 runs every row in full; ROWS=fuzz,storm runs those alone.
MINUTES ?= 5
ROWS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# constraints.txt names everything: nothing is resolved, and nothing that it does not name is installed. Python compiles a
# file when it first imports it: few of the 40,000 are.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
# Set in many containers: with it nothing compiled is kept, and each process of a server imports SGLang in 31 s, not 12.
unexport PYTHONDONTWRITEBYTECODE

# What engines are built for: the GPU at hand, or an RTX A6000.
TARGET ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+[.][0-9]' | head -n 1),8.6)
# What TensorRT-RTX builds for, which is installed; for others ENGINES=--tensorrt takes TensorRT, on the GPU itself.
RTX_TARGETS := 8.0 8.6 8.9 12.0 12.1
ENGINES = $(if $(filter $(TARGET),$(RTX_TARGETS)),--tensorrt --target $(TARGET))
SELECTION = $(BIN)/mmtok export selection --force $(ENGINES)

.PHONY: help install demo page bench export quality soak test test-fast test-all test-cpus gpu-check paper docs lint format constraints clean

help:
	@echo "make demo    ask a small model about a picture, with and without a budget, and show what changes"
	@echo "make page    the same in a browser: choose picture, question, budget and method, and see what is kept (PORT=8600)"
	@echo "make bench   what a served model gains from a budget, on this machine (on 2 CPU cores: tens of minutes)"
	@echo "make export  ONNX files and TensorRT engines of the selection, under artifacts/export (TARGET=8.9 for that GPU)"
	@echo "make quality every method and budget on the pocket tasks, with a report, under artifacts/quality"
	@echo "make soak    inject faults into servers and see what holds (MINUTES=30 runs all of it, ROWS=fuzz,storm a part)"
	@echo "make test    the tests, two at a time (JOBS=0: one by one); no GPU needed; test-fast: those without servers;"
	@echo "             test-all: also what repeats a test for every family and setting, and servers that start as users'"
	@echo "make test-cpus   the tests without servers as other processors compute: instruction sets, threads, last bits"
	@echo "make gpu-check   what needs an NVIDIA GPU: kernels, engines, served models, each against its bar (PART=kernels,selector)"
	@echo "make paper MODELS=/models   the paper's latency, memory and accuracy with real weights on this GPU (DRY=1 prints the steps)"
	@echo "make lint    ruff, mypy --strict and the direction of imports"
	@echo "make docs    the documentation as a site, under artifacts/site"
	@echo "make format  let ruff rewrite the code"
	@echo "make constraints   resolve all versions anew (slow)"
	@echo "make clean   remove .venv and artifacts"
	@echo "demo, page and quality take FAMILY=qwen2.5-vl for the other pocket model"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "mmtok-deploy needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	@test -x $(BIN)/python || $(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; sys.exit(0 if free >= 12 \
	  else f"mmtok-deploy needs 12 GB of disk for $(VENV), {free:.1f} GB are free here")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (SGLang and PyTorch: about 11 GB; minutes the first time)"
	$(PIP) --require-hashes -r constraints.txt
	$(PIP) --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/mmtok demo --family $(FAMILY)

page: $(STAMP)
	$(BIN)/mmtok demo --page --family $(FAMILY) --port $(PORT)

bench: $(STAMP)
	$(BIN)/mmtok bench serve --dummy-weights

export: $(STAMP)
	$(SELECTION) --preset llava-1.5 --tokens 576 --budget 64
	$(SELECTION) --preset llava-next --tokens 576 --batch 1:5 --budget 32
	$(SELECTION) --preset qwen2.5-vl --tokens 256:1024:2048 --budget 128 --dtype bfloat16
	@test -n "$(ENGINES)" || echo "No engines: TensorRT-RTX builds none for $(TARGET). On that GPU:" \
	  "$(BIN)/pip install -e '.[tensorrt]' && make export ENGINES=--tensorrt"

quality: $(STAMP)
	$(BIN)/mmtok quality --family $(FAMILY) --results-dir artifacts/quality --record
	$(BIN)/mmtok bench report artifacts/quality --force --output artifacts/quality/report.html --markdown artifacts/quality/report.md

soak: $(STAMP)
	$(BIN)/mmtok soak --minutes $(MINUTES) $(if $(ROWS),--rows $(ROWS))

# Two at a time, however many cores there are: each may start servers of a few GB.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not exhaustive" --durations 60 --durations-min 5

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not exhaustive"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --fresh-servers

# CPU_TESTS=tests/mmtok_deploy takes the selection's alone.
CPUS ?= native avx2 sse4 threads perturbed-1
CPU_TESTS ?= tests/mmtok_deploy tests/exporters tests/runtime
test-cpus: $(STAMP)
	tests/cpus.sh "$(CPUS)" -n $(JOBS) $(CPU_TESTS) --ignore=tests/mmtok_deploy/triton -m "not slow and not exhaustive" -k "not serving"

# What a machine without a GPU skips, in parts of a few minutes: PART=kernels,qwen-7b-16; a part that is done is not run again.
gpu-check: $(STAMP)
	$(BIN)/python -m mmtok_gpu_check $(if $(PART),--parts $(PART))

# MODELS is a folder of checkpoints, named as they are on Hugging Face.
paper: $(STAMP)
	$(BIN)/python -m mmtok_gpu_check.paper --checkpoints $(or $(MODELS),$(error make paper needs MODELS=/folder/of/checkpoints)) $(if $(DRY),--dry-run)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(STAMP)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs artifacts/site

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The versions of a fresh resolution; run the tests before committing what it writes. uv lists the hashes of the files for
# every platform and Python, where pip knows those at hand. Nothing of the large packages is downloaded but their metadata.
constraints:
	rm -rf $(VENV).new && $(PYTHON) -m venv $(VENV).new
	$(VENV).new/bin/python -m pip install --quiet --disable-pip-version-check uv
	(grep '^#' constraints.txt; $(VENV).new/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --extra dev pyproject.toml) > constraints.new
	mv constraints.new constraints.txt && rm -rf $(VENV).new

clean:
	rm -rf $(VENV) artifacts
