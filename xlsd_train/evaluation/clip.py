"""CLIP as a judge of pictures: where images and texts lie on its unit sphere."""

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
from xlsd_cache.images.decode import decode, header_of
from xlsd_cache.outcomes import Rejected
from xlsd_train.runs.json_files import misfit
from xlsd_train.weights.hub import TOKENIZER_FILES, fetch_model
from xlsd_train.weights.lazy_tensors import open_tensors
from xlsd_train.weights.network import read_json

Embeddings = NDArray[np.float64]  # [n, D], each of length 1
FILES = ["config.json", "preprocessor_config.json", *TOKENIZER_FILES]
BATCH, READERS = 32, 4  # images through CLIP at once; files decoded and prepared at once
PROCESSORS = (None, "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil",
              "CLIPFeatureExtractor")  # fmt: skip
MOST_SIDE = 4096  # pixels; the largest CLIPs see 560
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # some of CLIP's repositories have no other


@dataclass(frozen=True)
class Clip:
    """Both halves of a CLIP, with its own way of preparing images and texts."""

    model: Any
    processor: Any
    tokenizer: Any

    @property
    def tokens(self) -> int:
        """How much of a text it reads; 77."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Of each text; what is beyond `tokens` is cut."""
        found = []
        for start in range(0, len(texts), BATCH):
            ready = self.tokenizer(
                [*texts[start : start + BATCH]],
                padding=True, truncation=True, max_length=self.tokens, return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            pooled = self.model.text_model(ready.input_ids, attention_mask=ready.attention_mask)
            found.append(_unit(self.model.text_projection(pooled.pooler_output)))
        return np.concatenate(found)

    def files(self, paths: Sequence[Path], what: str) -> tuple[Embeddings, dict[Path, Rejected]]:
        """Of each image file that can be decoded, in order; and why others cannot be."""
        found = [np.empty((0, self.model.config.projection_dim))]
        rejected: dict[Path, Rejected] = {}
        with (
            ThreadPoolExecutor(READERS) as pool,
            progress_bar(total=len(paths), desc=what, unit="image") as bar,
        ):
            for start in range(0, len(paths), BATCH):
                batch = paths[start : start + BATCH]
                read = list(pool.map(self._read, batch))
                rejected |= {
                    path: it
                    for path, it in zip(batch, read, strict=True)
                    if isinstance(it, Rejected)
                }
                ready = [it for it in read if isinstance(it, Tensor)]
                if ready:
                    found.append(self.images(torch.stack(ready)))
                bar.update(len(batch))
        return np.concatenate(found), rejected

    @torch.no_grad()
    def images(self, prepared: Tensor) -> Embeddings:  # f32 [B, 3, S, S]
        """Of one batch."""
        pooled = self.model.vision_model(prepared.to(self.model.device)).pooler_output
        return _unit(self.model.visual_projection(pooled))

    def _read(self, path: Path) -> Tensor | Rejected:
        """An image's central square as CLIP takes it, f32 [3, S, S]."""
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
        ready: Tensor = self.processor(
            pixels, return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"][0]
        return ready

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of the texts are cut."""
        return sum(len(ids) > self.tokens for ids in self.tokenizer([*texts]).input_ids)


def load_clip(source: str, device: torch.device) -> Clip:
    """A CLIP of the hub's, or a folder with one, fp32. Raises UserError where there is none."""
    folder = _folder(source)
    told = read_json(folder / "config.json")
    kind = told.get("model_type")
    if kind != "clip":
        raise UserError(
            f"--clip {source} is a {kind} and no whole CLIP; give one with text and image encoder, "
            f"such as openai/clip-vit-large-patch14-336"
        )
    _refuse_other(folder, source)
    try:
        model, told = CLIPModel.from_pretrained(
            folder, config=_config(told, source), dtype=torch.float32, local_files_only=True,
            trust_remote_code=False, weights_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,  # they are told, and refused
        )  # fmt: skip
        # Without torchvision, so that scores are the same with it and without.
        processor = CLIPImageProcessorPil.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what damaged files make the libraries stumble over, whatever it is
        raise UserError(
            f"--clip {source} does not load: {one_line(error)}; give a folder "
            f"with {', '.join(FILES[:2])}, vocab.json, merges.txt and {WEIGHTS[0]} of a CLIP"
        ) from error
    # A key that does not fit comes with its two shapes.
    lacking = sorted([*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"--clip {source} lacks {len(lacking)} of a CLIP's weights, {lacking[0]} among them; "
            f"give one with text and image encoder"
        )
    return Clip(model.to(device).eval(), processor, tokenizer)


def _config(told: dict[str, Any], source: str) -> CLIPConfig:
    """CLIP's own classes, whatever other code the config names."""
    halves = {
        name: plain_config(half, f"--clip {source} has a CLIP")
        for name, half in told.items()
        if name in {"text_config", "vision_config"} and isinstance(half, dict)
    }
    found: CLIPConfig = CLIPConfig.from_dict(
        plain_config(told, f"--clip {source} has a CLIP") | halves
    )
    return found


def _refuse_other(folder: Path, source: str) -> None:
    """Raises UserError for other ways to prepare images than CLIP's, and for what is no weights."""
    path = folder / "preprocessor_config.json"
    told = read_json(path) if path.is_file() else {}
    named = told.get("image_processor_type") or told.get("feature_extractor_type")
    sides = [told.get(name) for name in ("size", "crop_size")]
    numbers = [x for it in sides for x in (it.values() if isinstance(it, dict) else [it])]
    if named not in PROCESSORS:
        raise UserError(
            f"--clip {source}: its preprocessor_config.json wants {named} to prepare images, and "
            f"no code but CLIP's own is run; give a CLIP that wants {PROCESSORS[1]}"
        )
    if any(x is not None and (misfit(x, int) or not 0 < x <= MOST_SIDE) for x in numbers):
        raise UserError(f"--clip {source}: {path} has a size that no CLIP has; give a whole CLIP")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"--clip {source} holds an adapter, which is no CLIP; give a whole CLIP")
    for name in WEIGHTS:
        if (folder / name).is_file():
            open_tensors(folder / name)
            break


def _folder(source: str) -> Path:
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


def _unit(embeddings: Tensor) -> Embeddings:
    found: Embeddings = F.normalize(embeddings.double(), dim=1).cpu().numpy()
    return found
