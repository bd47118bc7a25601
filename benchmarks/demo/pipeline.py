"""Write a small pipeline folder in SD1.5's layout, with SD1.5's block types and random weights.

Its VAE is the small one next to this file, distilled to SDXL's latent space. Its CLIP tokenizer has
merges that are learned from the given captions.

    python -m benchmarks.demo.pipeline OUT --captions IMAGES
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from diffusers import PNDMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel

from xlsd_train.config import sd15

VAE = Path(__file__).parent / "vae"
Size = Literal["nano", "demo", "keys", "sd15"]


@dataclass(frozen=True)
class Shape:
    """The parameters that differ between model sizes; all others are SD1.5's."""

    unet: tuple[int, int, int, int]  # block_out_channels
    layers: int  # per block of the UNet
    heads: int  # SD1.5's attention_head_dim, which is a number of heads
    groups: int  # of the norms
    text: int  # hidden size
    text_layers: int
    text_heads: int


SHAPES: dict[str, Shape] = {
    "nano": Shape((16, 32, 32, 32), 1, 2, 8, 32, 2, 2),  # tests
    "demo": Shape((32, 64, 96, 96), 1, 4, 16, 64, 2, 4),  # make demo
    "keys": Shape((32, 64, 96, 96), 2, 8, 32, 64, 12, 4),  # exactly SD1.5's state-dict keys
    "sd15": Shape(sd15.UNET["block_out_channels"], 2, 8, 32, 768, 12, 12),  # full size: benchmarks
}


def make_networks(size: Size, vocabulary: int, seed: int = 0) -> tuple[Any, Any]:
    """The UNet and the text encoder with random weights; the same seed gives the same ones."""
    shape = SHAPES[size]
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(
        {
            **sd15.UNET,
            "block_out_channels": shape.unet,
            "layers_per_block": shape.layers,
            "attention_head_dim": shape.heads,
            "norm_num_groups": shape.groups,
            "cross_attention_dim": shape.text,
        }
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=shape.text,
            intermediate_size=4 * shape.text,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=shape.text_heads,
            max_position_embeddings=sd15.TEXT_ENCODER["max_position_embeddings"],
            hidden_act=sd15.TEXT_ENCODER["hidden_act"],
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    return unet, text_encoder


def make_pipeline(out: Path, size: Size, captions: list[str], seed: int = 0) -> None:
    """Write the pipeline folder; the same seed and captions give the same bytes."""
    unet, text_encoder = make_networks(size, _write_tokenizer(out / "tokenizer", captions), seed)
    unet.save_pretrained(out / "unet")
    text_encoder.save_pretrained(out / "text_encoder")
    # SD1.5's names, which transformers 5 no longer writes.
    state = {f"text_model.{key}": value for key, value in text_encoder.state_dict().items()}
    save_file(state, out / "text_encoder" / "model.safetensors", {"format": "pt"})
    PNDMScheduler.from_config(sd15.SCHEDULER).save_pretrained(out / "scheduler")
    shutil.copytree(VAE, out / "vae", dirs_exist_ok=True)
    (out / "model_index.json").write_text(json.dumps(sd15.INDEX, indent=2) + "\n")


def _write_tokenizer(folder: Path, captions: list[str]) -> int:
    """Write a CLIP tokenizer with BPE merges learned from captions. Returns the vocabulary size."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet]
    merges = [
        "".join(pair) if isinstance(pair, str) else " ".join(pair) for pair in learnt["merges"]
    ]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(vocabulary)


def read_captions(folder: Path) -> list[str]:
    """The captions next to the demo's photos."""
    paths = sorted([*folder.rglob("*.txt"), *folder.rglob("*.title")])
    return [path.read_text() for path in paths]


def main(
    out: tyro.conf.Positional[Path], captions: Path, size: Size = "demo", seed: int = 0
) -> None:
    """Write a small SD1.5 into OUT, its tokenizer made for the captions in CAPTIONS."""
    make_pipeline(out, size, read_captions(captions), seed)
    print(f"a small SD1.5 ({size}) in {out}")


if __name__ == "__main__":
    tyro.cli(main)
