# make setup | setup-all | pretrain | finetune | study | test | coverage | soak | lint; see README.md.
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

.PHONY: setup setup-all pretrain finetune study test coverage soak lint test-cluster test-slurm

setup: .venv/.setup
setup-all: .venv/.setup-all

.venv/.setup: setup.py pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(PIP) $(PINS) -e '.[sample,plots]'
	touch $@

.venv/.setup-all: .venv/.setup
	$(PIP) $(PINS) -e '.[sample,plots,clip,hf,parquet,dali-cuda12,dev]'
	touch $@

pretrain: setup
	rm -rf $(RUN)
	deepmim-scale data samples samples
	deepspeed --num_accelerators $(NUM_PROCESSES) launcher/pretrain.py --preset quickstart --data samples --output $(RUN)
	deepmim-scale analyze losses $(RUN)
	deepmim-scale analyze reconstruct $(RUN)
	deepmim-scale evaluate digits $(RUN)

# Of the quickstart's encoder, which is pre-trained first if need be.
finetune: setup
	test -d $(RUN)/checkpoints || $(MAKE) pretrain
	rm -rf runs/finetune
	deepmim-scale evaluate finetune-digits $(RUN) --output runs/finetune --at-once $(NUM_PROCESSES)

# Three methods over depth, judged by probes on digits; goes on where it was stopped.
STUDY := runs/study
STUDY_DEPTHS ?= 6,12,24
STUDY_SEEDS ?= 5
STUDY_STEPS ?= 400
STUDY_EVALUATE ?= knn --data digits,linear --data digits
STUDY_MODEL := --img-size 32 --patch-size 4 --no-norm-pix --warmup-epochs 1 --blr 0.024 --loader-threads 1
STUDY_RUN = deepmim-scale study --depths $(STUDY_DEPTHS) --stages 1 --gpus-per-node $(NUM_PROCESSES) \
	--steps $(STUDY_STEPS) --repeats $(STUDY_SEEDS) --microbatch-size 16 --global-batch 32 \
	--data samples --evaluate "$(STUDY_EVALUATE)"

study: setup
	deepmim-scale data samples samples
	deepmim-scale data digits digits
	$(STUDY_RUN) --preset debug_mae --output $(STUDY)/mae -- $(STUDY_MODEL)
	$(STUDY_RUN) --preset debug --output $(STUDY)/deepmim --beside $(STUDY)/mae -- $(STUDY_MODEL)
	$(STUDY_RUN) --preset debug_mirl --output $(STUDY)/mirl --beside $(STUDY)/mae,$(STUDY)/deepmim -- $(STUDY_MODEL)

# Two workers, each with whole files; `python -m pytest -m "not soak"` runs the same one by one.
test: setup-all
	python -m pytest -m "not soak" -n 2 --dist loadfile

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

# Several hosts, and Slurm, in namespaces of this machine: root, Debian's packages, <= 10 minutes each.
test-cluster: setup-all
	python tests/cluster/run.py cluster

test-slurm: setup-all
	python tests/cluster/run.py slurm
