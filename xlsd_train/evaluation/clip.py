"""CLIP embeddings of images and texts, normalised, for CLIP score and CMMD."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from xlsd_cache.console.progress import progress_bar
from xlsd_cache.encoding.hub import no_such, repository_of
from xlsd_cache.encoding.network_config import plain_config
from xlsd_cache.errors import UserError, one_line
from xlsd_cache.images.decode import decode
from xlsd_cache.images.header import header_of
from xlsd_cache.outcomes import Rejected
from xlsd_train.runs.json_files import misfit
from xlsd_train.weights.hub import TOKENIZER_FILES, fetch_model
from xlsd_train.weights.lazy_tensors import open_tensors
from xlsd_train.weights.network import read_json

Embeddings = NDArray[np.float64]  # [n, D], unit vectors
FILES = ["config.json", "preprocessor_config.json", *TOKENIZER_FILES]
BATCH, READERS = 32, 4  # images per forward pass; threads that decode and preprocess
PROCESSORS = (None, "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil",
              "CLIPFeatureExtractor")  # fmt: skip
MOST_SIDE = 4096  # pixels; the largest CLIPs use 560
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # some CLIP repositories have only the second


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its image processor and tokenizer."""

    model: Any
    processor: Any
    tokenizer: Any

    @property
    def max_tokens(self) -> int:
        """Length of the longest text that it reads; 77 for OpenAI's."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed each text, truncated to `max_tokens`."""
        batches = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                [*texts[start : start + BATCH]],
                padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
            batches.append(_normalised(self.model.text_projection(pooled.pooler_output)))
        return np.concatenate(batches)

    def embed_files(
        self, paths: Sequence[Path], desc: str
    ) -> tuple[Embeddings, dict[Path, Rejected]]:
        """Embed the images that can be decoded, in order; `desc` labels the progress bar."""
        batches = [np.empty((0, self.model.config.projection_dim))]
        rejected: dict[Path, Rejected] = {}
        with (
            ThreadPoolExecutor(READERS) as pool,
            progress_bar(total=len(paths), desc=desc, unit="image") as bar,
        ):
            for start in range(0, len(paths), BATCH):
                batch = paths[start : start + BATCH]
                results = list(pool.map(self._preprocess, batch))
                rejected |= {
                    path: result
                    for path, result in zip(batch, results, strict=True)
                    if isinstance(result, Rejected)
                }
                pixels = [result for result in results if isinstance(result, Tensor)]
                if pixels:
                    batches.append(self.embed_images(torch.stack(pixels)))
                bar.update(len(batch))
        return np.concatenate(batches), rejected

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Embeddings:
        """Embed one batch of preprocessed images, f32 [B, 3, S, S]."""
        pooled = self.model.vision_model(pixels.to(self.model.device)).pooler_output
        return _normalised(self.model.visual_projection(pooled))

    def _preprocess(self, path: Path) -> Tensor | Rejected:
        """Decode an image and make CLIP's input of its central square, f32 [3, S, S]."""
        try:
            data = path.read_bytes()
        except OSError as error:
            return Rejected("unreadable", str(error))
        size = header_of(data)
        if isinstance(size, Rejected):
            return size
        pixels = decode(data, size, (0, 0, *size), size)
        if isinstance(pixels, Rejected):
            return pixels
        values: Tensor = self.processor(
            pixels, return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"][0]
        return values

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Number of texts that are longer than `max_tokens`."""
        return sum(len(ids) > self.max_tokens for ids in self.tokenizer([*texts]).input_ids)


def load_clip(source: str, device: torch.device) -> Clip:
    """Load a CLIP in fp32 from a hub id or a folder. Raises UserError if there is none."""
    folder = _locate(source)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "clip":
        raise UserError(
            f"--clip {source} is a {kind}, not a complete CLIP; give one with text and image "
            f"encoder, e.g. openai/clip-vit-large-patch14-336"
        )
    _check_preprocessor(folder, source)
    try:
        model, loading = CLIPModel.from_pretrained(
            folder, config=_clip_config(config, source), dtype=torch.float32, local_files_only=True,
            trust_remote_code=False, weights_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,  # they are refused below
        )  # fmt: skip
        # The processor that needs no torchvision, so that scores do not depend on its presence.
        local = {"local_files_only": True, "trust_remote_code": False}
        processor = CLIPImageProcessorPil.from_pretrained(folder, **local)
        tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # damaged files may raise anything in the libraries
        raise UserError(
            f"--clip {source} cannot be loaded: {one_line(error)}; give a folder "
            f"with {', '.join(FILES[:2])}, vocab.json, merges.txt and {WEIGHTS[0]} of a CLIP"
        ) from error
    # A mismatched key comes with its two shapes.
    mismatched = (key for key, *_ in loading["mismatched_keys"])
    missing = sorted([*loading["missing_keys"], *mismatched])
    if missing:
        raise UserError(
            f"--clip {source} lacks {len(missing)} of a CLIP's weights, e.g. {missing[0]}; give "
            f"one with text and image encoder"
        )
    return Clip(model.to(device).eval(), processor, tokenizer)


def _clip_config(config: dict[str, Any], source: str) -> CLIPConfig:
    """A config for CLIP's own classes, without other code that config.json may ask for."""
    encoders = {
        name: plain_config(value, f"--clip {source} has a CLIP")
        for name, value in config.items()
        if name in {"text_config", "vision_config"} and isinstance(value, dict)
    }
    plain: CLIPConfig = CLIPConfig.from_dict(
        plain_config(config, f"--clip {source} has a CLIP") | encoders
    )
    return plain


def _check_preprocessor(folder: Path, source: str) -> None:
    """Raises UserError for another preprocessor than CLIP's, an adapter, or damaged weights."""
    path = folder / "preprocessor_config.json"
    config = read_json(path) if path.is_file() else {}
    processor = config.get("image_processor_type") or config.get("feature_extractor_type")
    sizes = [config.get(name) for name in ("size", "crop_size")]
    sides = [x for size in sizes for x in (size.values() if isinstance(size, dict) else [size])]
    if processor not in PROCESSORS:
        raise UserError(
            f"--clip {source}: preprocessor_config.json asks for {processor}, and only CLIP's own "
            f"image processor is run; give a CLIP with {PROCESSORS[1]}"
        )
    if any(x is not None and (misfit(x, int) or not 0 < x <= MOST_SIDE) for x in sides):
        why = f"a size in {path} is not from 1 to {MOST_SIDE}"
        raise UserError(f"--clip {source}: {why}; give a complete CLIP")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"--clip {source} is an adapter; give a complete CLIP")
    for name in WEIGHTS:
        if (folder / name).is_file():
            open_tensors(folder / name)
            break


def _locate(source: str) -> Path:
    """The folder of a CLIP, downloaded if `source` is a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    repository = None if folder.exists() else repository_of(source)
    if repository is None:
        raise UserError(f"--clip {no_such(source)}; give a hub id ORG/NAME or a folder with a CLIP")
    for file in WEIGHTS:
        needed = ["config.json", "|".join(WEIGHTS)]
        folder = fetch_model(repository, [*FILES, file], needed, "--clip")
        if (folder / file).is_file():
            break
    return folder


def _normalised(embeddings: Tensor) -> Embeddings:
    unit: Embeddings = F.normalize(embeddings.double(), dim=1).cpu().numpy()
    return unit
