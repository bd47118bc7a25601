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
from tqdm import tqdm
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

from xlsd_cache import UserError
from xlsd_cache.decode import Rejected, decode, header_of
from xlsd_cache.hub import no_such, repository_of
from xlsd_train.hub import TOKENIZER_FILES, fetch_model
from xlsd_train.network import read_json

Embeddings = NDArray[np.float64]  # [n, D], each of length 1
FILES = ["config.json", "preprocessor_config.json", *TOKENIZER_FILES]
BATCH, READERS = 32, 4  # images through CLIP at once; files decoded and prepared at once
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
            tqdm(total=len(paths), desc=what, unit="image") as bar,
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
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise UserError(
            f"--clip {source} is a {kind} and no whole CLIP; give one with text and image encoder, "
            f"such as openai/clip-vit-large-patch14-336"
        )
    try:
        model, told = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,  # they are told, and refused
        )  # fmt: skip
        # Without torchvision, so that scores are the same with it and without.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # what damaged files make the libraries stumble over, whatever it is
        raise UserError(
            f"--clip {source} does not load: {' '.join(str(error).split())[:200]}; give a folder "
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
