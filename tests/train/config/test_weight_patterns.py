import pytest

from xlsd_cache.errors import UserError
from xlsd_train.config.weight_patterns import choose, split

NAMES = [
    "unet.conv_in.weight",
    "unet.conv_in.bias",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight",
    "unet.up_blocks.1.attentions.2.proj_in.weight",
    "unet.up_blocks.1.resnets.0.conv1.bias",
    "unet.conv_out.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
]


def chosen(patterns: str) -> list[int]:
    found = choose(NAMES, split(patterns, "--train", "both"), "--train")
    return [NAMES.index(name) for name in found]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("unet.attn2", [3]),
        ("unet.conv_in", [0, 1]),
        ("unet.attn2,unet.conv_in", [0, 1, 3]),
        (" unet.conv_in.weight , unet.conv_in", [0, 1]),
        ("unet", [0, 1, 2, 3, 4, 5, 6]),
        ("unet.attn?", [2, 3]),
        ("unet.conv_*", [0, 1, 6]),
        ("unet.up_blocks.1", [4, 5]),
        ("unet.up_blocks.*.attentions", [4]),
        ("unet.*.attentions.*.proj_in", [4]),
        ("unet.0", [2, 3, 5]),
        ("text_encoder.layers.0,unet.conv_out", [6, 7]),
        ("text_encoder.text_model.encoder", [7]),
    ],
)
def test_patterns_are_components_in_a_row(patterns: str, expected: list[int]) -> None:
    assert chosen(patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ("unet.atn2", "--train unet.atn2 matches no parameter; did you mean unet.attn2"),
        ("unet.conv", "did you mean unet.conv1, unet.conv_in"),  # never a part of a component
        ("unet.upblocks.1", "did you mean unet.up_blocks.1"),
        ("unet.attn2.1", "unet.attn2.1 matches no parameter"),
        ("unet.conv_in,unet.qqqqqq", "unet.qqqqqq matches no parameter; see the names"),
        ("text_encoder.conv_in", "text_encoder.conv_in matches no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(
    patterns: str, told: str
) -> None:
    with pytest.raises(UserError, match="--train") as error:
        chosen(patterns)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("patterns", "phase", "told"),
    [
        ("", "unet", "is empty"),
        (" , ", "unet", "is empty"),
        ("attn2", "unet", "give e.g. unet.attn2"),
        ("vae.conv_in", "unet", "does not start with unet or text_encoder"),
        ("text_encoder.layers", "unet", "use --phase te or both"),
        ("unet.attn2", "te", "use --phase unet or both"),
    ],
)
def test_a_part_that_cannot_be_meant_is_refused(patterns: str, phase: str, told: str) -> None:
    with pytest.raises(UserError, match="--train") as error:
        split(patterns, "--train", phase)
    assert told in str(error.value)
