"""SD1.5's single file, written out from latent-diffusion's side: v1-inference.yaml and its modules.

Nothing here looks at diffusers' names: the lists say which module LDM makes at which place, with
which shape.
"""

Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def ldm_resnet(at: str, width: int, out: int, embedding: int) -> Shapes:
    made = layer(f"{at}.in_layers.0", width) | layer(f"{at}.in_layers.2", out, width, 3, 3)
    made |= layer(f"{at}.emb_layers.1", out, embedding)
    made |= layer(f"{at}.out_layers.0", out) | layer(f"{at}.out_layers.3", out, out, 3, 3)
    return made | (layer(f"{at}.skip_connection", out, width, 1, 1) if width != out else {})


def ldm_transformer(at: str, width: int, context: int) -> Shapes:
    made = layer(f"{at}.norm", width)
    made |= layer(f"{at}.proj_in", width, width, 1, 1) | layer(f"{at}.proj_out", width, width, 1, 1)
    block = f"{at}.transformer_blocks.0"
    for attention, keys in (("attn1", width), ("attn2", context)):
        made[f"{block}.{attention}.to_q.weight"] = (width, width)
        made[f"{block}.{attention}.to_k.weight"] = (width, keys)
        made[f"{block}.{attention}.to_v.weight"] = (width, keys)
        made |= layer(f"{block}.{attention}.to_out.0", width, width)
    made |= layer(f"{block}.ff.net.0.proj", 8 * width, width)
    made |= layer(f"{block}.ff.net.2", width, 4 * width)
    for norm in (1, 2, 3):
        made |= layer(f"{block}.norm{norm}", width)
    return made


def ldm_unet() -> Shapes:
    """320 channels by 1 2 4 4, two resnets a level, attention in all but the last, context 768."""
    base, context, embedding = 320, 768, 1280
    made = layer("time_embed.0", embedding, base) | layer("time_embed.2", embedding, embedding)
    made |= layer("input_blocks.0.0", base, 4, 3, 3)
    skips, width, room = [base], base, 0
    for level, multiple in enumerate((1, 2, 4, 4)):
        for _ in range(2):
            room += 1
            made |= ldm_resnet(f"input_blocks.{room}.0", width, base * multiple, embedding)
            width = base * multiple
            if level < 3:
                made |= ldm_transformer(f"input_blocks.{room}.1", width, context)
            skips.append(width)
        if level < 3:
            room += 1
            made |= layer(f"input_blocks.{room}.0.op", width, width, 3, 3)
            skips.append(width)
    made |= ldm_resnet("middle_block.0", width, width, embedding)
    made |= ldm_transformer("middle_block.1", width, context)
    made |= ldm_resnet("middle_block.2", width, width, embedding)
    room = -1
    for level, multiple in reversed(list(enumerate((1, 2, 4, 4)))):
        for i in range(3):
            room += 1
            out = base * multiple
            made |= ldm_resnet(f"output_blocks.{room}.0", width + skips.pop(), out, embedding)
            width, place = out, 1
            if level < 3:
                made |= ldm_transformer(f"output_blocks.{room}.1", width, context)
                place = 2
            if level and i == 2:
                made |= layer(f"output_blocks.{room}.{place}.conv", width, width, 3, 3)
    return made | layer("out.0", base) | layer("out.2", 4, base, 3, 3)


def ldm_vae_resnet(at: str, width: int, out: int) -> Shapes:
    made = layer(f"{at}.norm1", width) | layer(f"{at}.conv1", out, width, 3, 3)
    made |= layer(f"{at}.norm2", out) | layer(f"{at}.conv2", out, out, 3, 3)
    return made | (layer(f"{at}.nin_shortcut", out, width, 1, 1) if width != out else {})


def ldm_vae_middle(at: str, width: int) -> Shapes:
    made = ldm_vae_resnet(f"{at}.block_1", width, width) | layer(f"{at}.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        made |= layer(f"{at}.attn_1.{name}", width, width, 1, 1)
    return made | ldm_vae_resnet(f"{at}.block_2", width, width)


def ldm_vae() -> Shapes:
    """ch 128, ch_mult 1 2 4 4, num_res_blocks 2, z_channels 4, double_z."""
    made = layer("quant_conv", 8, 8, 1, 1) | layer("post_quant_conv", 4, 4, 1, 1)
    made |= layer("encoder.conv_in", 128, 3, 3, 3)
    width = 128
    for level, multiple in enumerate((1, 2, 4, 4)):
        for i in range(2):
            made |= ldm_vae_resnet(f"encoder.down.{level}.block.{i}", width, 128 * multiple)
            width = 128 * multiple
        if level < 3:
            made |= layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    made |= ldm_vae_middle("encoder.mid", width) | layer("encoder.norm_out", width)
    made |= layer("encoder.conv_out", 8, width, 3, 3) | layer("decoder.conv_in", width, 4, 3, 3)
    made |= ldm_vae_middle("decoder.mid", width)
    for level, multiple in reversed(list(enumerate((1, 2, 4, 4)))):
        for i in range(3):
            made |= ldm_vae_resnet(f"decoder.up.{level}.block.{i}", width, 128 * multiple)
            width = 128 * multiple
        if level:
            made |= layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return made | layer("decoder.norm_out", width) | layer("decoder.conv_out", 3, width, 3, 3)


def ldm_text_encoder() -> Shapes:
    """CLIP ViT-L/14's, position_ids included, which today's transformers no longer keep."""
    made: Shapes = {
        "text_model.embeddings.position_ids": (1, 77),
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
    }
    for i in range(12):
        at = f"text_model.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            made |= layer(f"{at}.self_attn.{name}", 768, 768)
        made |= layer(f"{at}.layer_norm1", 768) | layer(f"{at}.layer_norm2", 768)
        made |= layer(f"{at}.mlp.fc1", 3072, 768) | layer(f"{at}.mlp.fc2", 768, 3072)
    return made | layer("text_model.final_layer_norm", 768)


def published() -> Shapes:
    """Names and shapes of v1-5-pruned-emaonly.safetensors but its two counters of a moving average.

    1,131 of networks and 12 of the noise schedule (ddpm.py, register_schedule).
    """
    made = {f"model.diffusion_model.{name}": shape for name, shape in ldm_unet().items()}
    made |= {f"first_stage_model.{name}": shape for name, shape in ldm_vae().items()}
    made |= {
        f"cond_stage_model.transformer.{name}": shape for name, shape in ldm_text_encoder().items()
    }
    schedule = (
        "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod "
        "sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod "
        "sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped "
        "posterior_mean_coef1 posterior_mean_coef2"
    )
    return made | dict.fromkeys(schedule.split(), (1000,))
