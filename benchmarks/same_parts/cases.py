"""What `benchmarks/same.py` compares: stores, runs of every kind, and what is made from them."""

from dataclasses import dataclass

COMMON = (
    "--data ../store/latents --model {inputs}/model --out run --batch 2 --steps 60 --warmup 6"
    " --save-every 30 --keep 0 --sample-every 30 --sample-steps 2"
    " --sample-prompts {inputs}/prompts.txt --validate-every 15 --validation-fraction 0.3"
)
PHASES = {
    "unet": "--phase unet --caption txt --caption-dropout 0.1",
    "te": "--phase te --caption title",
}
OPTIMIZERS = {
    "lion": "--optimizer lion --lr 1e-3 --accum 2 --micro-batch 1 --ema",
    "dlion": "--optimizer dlion --batch 4 --micro-batch 2",
}
MEMORY = ("plain", "cheap", "feed-forward", "sliced")
OPTIONS = {
    "both": "--phase both --data ../store/latents:3 ../store-float16/latents --optimizer adamw"
    " --lr 1e-4 --scheduler cosine --caption txt=3,title=1 --shuffle tags --keep-first 1"
    " --tag-dropout 0.1 --max-tags 4 --caption-dropout 0.1 --clip-skip 1 --objective v"
    " --loss-weight min-snr --normalize-latents --ema --ema-every 2 --memory cheap --micro-batch 1",
    "part": "--phase unet --caption txt --train unet.attn2,unet.conv_in --reinit unet.conv_in"
    " --lr 1e-3 --scheduler rex --lr-floor 1e-4 --tokens 248 --objective flow --noise-offset 0.05"
    " --timesteps stratified --forbid-tags floodlight --weight-decay 0.01 --memory plain"
    " --micro-batch 2 --validation-fraction 0.5",
}
READ_STORE = (
    "xlsd_cache info latents --json > info.json",
    "xlsd_cache check latents --decode 4 --json > check.json",
    "xlsd_cache export-index latents index.parquet",
    "xlsd_cache preview latents preview.png --count 4",
)
READ_RUN = (  # what is read of a run, and made from it
    "xlsd_train export run folder",
    "xlsd_train export run one.safetensors --format single-file --dtype fp16",
    "xlsd_train sample run {inputs}/model --prompts {inputs}/prompts.txt --steps 2",
    "xlsd_train report run",
)


@dataclass(frozen=True)
class Case:
    """Commands, run one after another in a folder of their own."""

    commands: tuple[str, ...]  # `2x` before one: as two processes; `> FILE` after it: its stdout
    needs: tuple[str, ...] = ()  # cases that run first, on the same side
    of: str = ""  # begin with a copy of what BEFORE wrote in this case
    equals: str = ""  # compare with what BEFORE wrote in this case, and run only AFTER


def cases() -> dict[str, Case]:
    """Every case by its name, in the order in which they run."""
    build = "xlsd_cache build {inputs}/images --out latents --vae {inputs}/model/vae"
    build += " --resolution 128 --captions txt,title"
    store = f"{build} --rows-per-shard 2"
    small = f"{build} --buckets square --store-dtype float16 --upscale"
    grown = store.replace("/images", "/images {inputs}/more")
    found = {
        # `info` writes what runs would: the index of tags.
        "store": Case((store, READ_STORE[0])),
        "store-float16": Case((small, READ_STORE[0])),
        "store-two": Case((f"2x {store}",)),
        "read-store": Case(READ_STORE, of="store"),
        "read-store-grown": Case((grown, *READ_STORE[:2]), of="store"),
    }
    trained = {
        f"{phase}-{memory}-{optimizer}": f"{PHASES[phase]} --memory {memory} {flags}"
        for phase in PHASES
        for memory in MEMORY
        for optimizer, flags in OPTIMIZERS.items()
    }
    for name, flags in trained.items():
        found[name] = Case((f"xlsd_train {COMMON} {flags}",), ("store",))
    for name, flags in OPTIONS.items():
        found[f"options-{name}"] = Case(
            (f"xlsd_train {COMMON} {flags}",), ("store", "store-float16")
        )
    for name, optimizer in (("unet-plain", "lion"), ("te-sliced", "dlion")):
        flags = trained[f"{name}-{optimizer}"] + " --accum 2 --ema"
        found[f"{name}-{optimizer}-two"] = Case((f"2x xlsd_train {COMMON} {flags}",), ("store",))
    for name in ("unet-sliced-lion", "te-cheap-dlion", "unet-plain-lion-two"):
        (whole,) = found[name].commands
        found[f"stopped-{name}"] = Case((f"{whole} --stop-after 30",), ("store",))
        found[f"resume-{name}"] = Case((whole,), ("store",), f"stopped-{name}", equals=name)
    sweep = f"{PHASES['te']} --lr 1e-3,1e-4 --steps 8 --memory plain --micro-batch 2"
    found["sweep"] = Case((f"xlsd_train sweep {COMMON} {sweep}",), ("store",))
    chain = f"xlsd_train {COMMON} {trained['te-plain-lion']} --model run --out next"
    ema = "xlsd_train ema run average --sigma-rel 0.15"
    found["read-unet"] = Case((*READ_RUN, ema, chain), ("store",), of="unet-sliced-lion")
    found["read-te"] = Case((*READ_RUN, ema), of="te-plain-lion")
    found["read-options"] = Case(READ_RUN, of="options-part")
    return found
