# make setup | setup-all | pretrain | test | coverage | soak | lint; see README.md.
PYTHON ?= python3
# Another index for torch and torchvision together, e.g. https://download.pytorch.org/whl/cu126
TORCH_INDEX ?=
NUM_PROCESSES ?= 2
RUN := runs/quickstart
PIP := .venv/bin/python -m pip install --quiet
# The tested versions, unless the index of your choice decides.
PINS := $(if $(TORCH_INDEX),,-c constraints.txt)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS ?= 1

.PHONY: setup setup-all pretrain test coverage soak lint

setup: .venv/.setup
setup-all: .venv/.setup-all

.venv/.setup: setup.py pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(PIP) $(PINS) -e '.[sample,plots]'
	touch $@

.venv/.setup-all: .venv/.setup
	$(PIP) $(PINS) -e '.[sample,plots,clip,parquet,dali-cuda12,dev]'
	touch $@

pretrain: setup
	rm -rf $(RUN)
	deepmim-scale data samples samples
	deepspeed --num_accelerators $(NUM_PROCESSES) launcher/pretrain.py --preset quickstart --data samples --output $(RUN)
	deepmim-scale analyze losses $(RUN)
	deepmim-scale analyze reconstruct $(RUN)
	deepmim-scale evaluate digits $(RUN)

test: setup-all
	python -m pytest -m "not soak"

# Apart from `make test`: before Python 3.12 measuring slows everything down.
coverage: setup-all
	coverage run -m pytest -m "not soak"
	coverage combine --quiet
	coverage report

soak: setup-all
	python -m pytest -m soak

lint: setup-all
	ruff check .
	ruff format --check .
	codespell
	mypy
