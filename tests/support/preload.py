"""Modules that the fork server imports once for all processes of the tests."""

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
import torch.utils.tensorboard
import transformers.models.clip.modeling_clip

import xlsd_cache.commands.build
import xlsd_cache.commands.check
import xlsd_cache.commands.import_latents
import xlsd_cache.commands.watch
import xlsd_train.training.loop

__all__ = ["diffusers", "torch", "transformers", "xlsd_cache", "xlsd_train"]
