# make demo   install, prepare, train, test: a small system from nothing to a table
# make demo-dm  the same with a diffusion model
# make test   install, run the tests; test-all: the long ones too; test-oldest: with the oldest libraries
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Overrides of the demo's options, as `make demo PSNR="train.iterations=4 ..." GAN="..."`: .ci/run trains a few steps.
PSNR ?=
GAN ?=

# The control: all else is the same.
WITHOUT_SSL = task=demo_gan train.ssl_l1_weight=0 train.ssl_kl_weight=0

.PHONY: demo demo-dm test test-all test-oldest check schema

demo: $(VENV)/.installed
	$(RUN) main_prepare_data.py demo
	$(RUN) main_train_psnr.py --opt options/train_demo_psnr.json $(PSNR)
	$(RUN) main_train_gan.py --opt options/train_demo_gan_ssl.json $(WITHOUT_SSL) $(GAN)
	$(RUN) main_train_gan.py --opt options/train_demo_gan_ssl.json $(GAN)
	$(RUN) main_test.py --model_path psnr=experiments/demo_psnr gan=experiments/demo_gan \
		gan_ssl=experiments/demo_gan_ssl --gt testsets/demo --metrics default stlpips_vgg

demo-dm: $(VENV)/.installed-extra
	$(RUN) main_prepare_data.py demo
	$(RUN) main_train_dm.py --opt options/train_resshift_demo.json
	$(RUN) main_test.py --model_path experiments/resshift_demo --gt testsets/demo

# A process for each core, but no more than eight; one test alone: make test PYTEST="-n 0 -k NAME"
PYTEST ?=
test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST)

# And what takes many minutes: many kills, many examples.
test-all: $(VENV)/.installed-dev
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal -m "long or not long" $(PYTEST)

# The oldest versions that requirements.txt allows, in an environment of their own: PYTHON=python3.10
OLDEST = $(VENV)-oldest
OLDEST_TESTS = blindsr checkpoint fuzz image kill main_test names option prepare realesrgan ssl step strangers tiff \
	train wrong_inputs
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST) \
		$(OLDEST_TESTS:%=tests/test_%.py)

# Style, types, and whether the generated schema is the one of the code.
check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy .

# Editors complete option files from this; run it after changing the options.
schema: $(VENV)/.installed
	$(RUN) -m utils.utils_option > options/schema.json

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-extra: requirements-extra.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-extra.txt $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
