"""A loop like diffusers' train_text_to_image.py trains from a store, on our own batches."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer

from tests.support.sessions import Open
from xlsd_cache import BucketBatchSampler, LatentDataset, LatentStore


def train(model: Path, store: Path, workers: int, epochs: int = 3) -> list[float]:
    """The losses of a plain loop over the store."""
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    dataset = LatentDataset(LatentStore.open(store), caption="txt")
    sampler = BucketBatchSampler(dataset, batch_size=3, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            latents = batch["latents"]
            noise = torch.randn(latents.shape, generator=generator)
            steps = noise_scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, steps, (len(latents),), generator=generator)
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            tokens = tokenizer(
                batch["caption"], padding="max_length", truncation=True, return_tensors="pt"
            )
            states = text_encoder(tokens.input_ids)[0]
            loss = mse_loss(unet(noisy, timesteps, states).sample, noise)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_a_plain_diffusers_loop_trains_with_and_without_workers(model: Path, store: Path) -> None:
    losses = train(model, store, workers=0)
    assert len(losses) > 6
    assert sum(losses[-3:]) < sum(losses[:3])
    assert train(model, store, workers=2) == losses


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_that_a_run_trains_on(
    store: Path, open_run: Open, workers: int
) -> None:
    session = open_run(batch=3)
    dataset = LatentDataset(LatentStore.open(store))
    sampler = BucketBatchSampler(dataset, batch_size=3, seed=0)
    number = 0
    for _ in range(2):
        for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=workers):
            ours = session.source.make(session.batch_order.slot(number))
            assert torch.equal(batch["latents"], session.model.scaling(ours.latents))
            tokens = session.source.captions.tokenize(batch["caption"])
            assert torch.equal(tokens, ours.input_ids)
            number += 1
    assert number > 4
