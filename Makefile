# make demo   from nothing to a trained small model with samples, in a few minutes on two CPU cores
# make test   lint, types and tests
# Both make .venv when there is none. On a machine with a CUDA card torch comes with CUDA.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench-smoke clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11" && false)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# What a user with a 24 GB card types, with a smaller model, smaller pictures and fewer steps.
demo: $(INSTALLED)
	rm -rf demo
	$(BIN)/python -m benchmarks.demo.photos demo/images
	$(BIN)/python -m benchmarks.demo.pipeline demo/model --captions demo/images
	$(BIN)/xlsd-cache build demo/images --out demo/latents --vae demo/model/vae \
		--resolution 128 --captions txt,title
	$(BIN)/xlsd-cache check demo/latents --decode 8
	$(BIN)/xlsd-train --phase unet --batch 5 --data demo/latents --model demo/model \
		--out demo/unet --caption txt --caption-dropout 0.1 --steps 1000 --lr 3e-4 \
		--warmup 50 --sample-every 250 --sample-guidance 3 \
		--sample-prompts benchmarks/demo/tags.txt
	$(BIN)/xlsd-train --phase te --batch 5 --data demo/latents --model demo/unet \
		--out demo/te --caption title --steps 120 --lr 1e-3 \
		--sample-every 60 --sample-guidance 3 \
		--sample-prompts benchmarks/demo/titles.txt
	@echo
	@echo "The UNet learns to draw from tags:         demo/unet/samples/grid.png"
	@echo "Then the text encoder learns other words:  demo/te/samples/grid.png"

test: $(INSTALLED) lint
	$(BIN)/pytest --numprocesses 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-smoke: $(INSTALLED)
	$(BIN)/python benchmarks/throughput.py --steps 1 --batch 2 --resolution 64

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
