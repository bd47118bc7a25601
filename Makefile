# make demo      from nothing to a trained small model with samples, in a few minutes on two CPU cores
# make article   the article in miniature: two phases, a sweep, a choice by validation, comparison
# make test      lint, types and tests
# make docs      the documentation, in site/; needs no network once installed
# Both make .venv when there is none. On a machine with a CUDA card torch comes with CUDA.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo article test lint docs bench-smoke clean
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

# The recipes one after the other; flags are where some eighty crops on a processor need another number
# than millions of photos on a card. D-Lion's d finds no plateau here (dlion's metrics.jsonl: 5.1e-4 at
# its step 150, and it grows on), so Lion goes on at about that rate. The sweep chose 1e-4.
HERE := --validation-fraction 0.15 --sample-steps 10 --sample-guidance 3
XLSD := $(BIN)/xlsd-train
article: $(INSTALLED)
	rm -rf article
	$(BIN)/python -m benchmarks.demo.subjects article/images
	$(BIN)/python -m benchmarks.demo.pipeline article/model --captions article/images
	for part in narrow broad; do $(BIN)/xlsd-cache build article/images/$$part \
		--out article/$$part --vae article/model/vae --resolution 128 || exit; done
	$(XLSD) --recipe phase1-unet --batch 8 --steps 150 --warmup 15 --data article/narrow \
		--model article/model --out article/dlion $(HERE) --validate-every 50 --sample-every 150
	$(XLSD) --recipe phase1-unet --optimizer lion --lr 4e-4 --batch 4 --steps 1000 \
		--warmup 20 --data article/narrow --model article/dlion --out article/phase1 $(HERE) \
		--validate-every 250 --sample-every 250
	$(XLSD) sweep --recipe phase1-te --lr 3e-4,1e-4,3e-5,1e-5 --batch 4 --steps 600 \
		--stop-after 30 --data article/narrow --model article/phase1 --out article/sweep \
		$(HERE) --validate-every 10 --sample-every 30
	$(XLSD) --recipe phase1-te --lr 1e-4 --batch 4 --steps 600 --stop-after 50 \
		--data article/narrow --model article/phase1 --out article/te $(HERE) --validate-every 10
	$(XLSD) --recipe phase2-unet --lr 3e-4 --batch 4 --steps 700 --warmup 20 \
		--data article/broad article/narrow --model article/te --out article/phase2 $(HERE) \
		--validate-every 175 --sample-every 350
	$(XLSD) export article/phase2 article/phase2.safetensors --format single-file
	$(XLSD) sample base=article/model phase1=article/phase1 te=article/te phase2=article/phase2 \
		--prompts benchmarks/demo/subjects.txt --size 128x128 --guidance 3 --out article/comparison
	@echo
	@echo "The same prompts, base / phase 1 / text encoder / phase 2: article/comparison/grid.png"
	@echo "  one page with a slider between any two:     article/comparison/index.html"
	@echo "Which rate trains the text encoder:           article/sweep/report.html"
	@echo "Its samples every 10 steps of the warm-up:    article/te/samples/grid.png"
	@echo "A model for other programs:                   article/phase2.safetensors"

test: $(INSTALLED) lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench-smoke: $(INSTALLED)
	$(BIN)/python benchmarks/throughput.py --steps 1 --batch 2 --resolution 64

clean:
	rm -rf $(VENV) demo article build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
