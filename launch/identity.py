"""Which run this is: the flags and files that decide its weights, by what they say, not by where they lie."""

import json

from launch.model import read_config
from launch.options import BatchPlan, optimizer_overrides
from launch.tokenizer import fingerprint

_BEFORE = {"--schedule": "cosine"}  # flags that came later, and what runs did that do not name them
_OF_THE_FILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def describe_run(args, config: dict | None, plan: BatchPlan, tokenizer, text: dict) -> dict:
    """{flag: value} of what a resumed run must have in common with the one that saved.

    Free to change: engine, number of processes, micro-batch, activation checkpointing, where files lie, --log-every,
    --eval-every and --save-every. text: {flag: value} of the data, such as its fingerprint.
    """
    section = config["optimizer"] if config else {"type": args.optimizer, "params": optimizer_overrides(args)}
    options = {key: value for key, value in section["params"].items() if key not in ("lr", "rank", "layerwise")}
    layerwise = section["params"].get("layerwise")
    clip = layerwise.get("clip") if isinstance(layerwise, dict) else args.clip
    model = read_config(args.model).to_diff_dict()
    run = {
        "--model": {key: value for key, value in model.items() if key not in _OF_THE_FILE},
        "--tokenizer": fingerprint(tokenizer),
        **text,
        "--seq-len": args.seq_len,
        "--optimizer": section["type"],
        "--optimizer-args": options,
        "--lr": section["params"].get("lr"),
        "--rank": section["params"].get("rank"),
        "--embed-lr": args.embed_lr,
        "--gradient-clipping": float((config or {}).get("gradient_clipping") or args.gradient_clipping or 0),
        "--clip": None if clip == "two_pass" else clip,  # that is the exact norm, as without --layerwise
        "--dtype": dtype_name(args, config),
        "--wire-dtype": args.wire_dtype,  # bf16 rounds what replicas exchange
        "--steps": args.steps,
        "--batch-size": plan.total,
        "--warmup-steps": args.warmup_steps,
        "--schedule": args.schedule,
        "--min-lr-ratio": args.min_lr_ratio,
        "--deepspeed_config's scheduler": (config or {}).get("scheduler"),
        "--seed": args.seed,
    }
    return json.loads(json.dumps(run))  # as a checkpoint gives it back


def dtype_name(args, config: dict | None) -> str:
    """What the model is computed in."""
    if config is not None:
        return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
    return args.dtype


def compare(place: str, saved: dict, run: dict) -> None:
    saved = {flag: value for flag, value in _BEFORE.items() if flag in run} | saved
    different = [
        f"{flag} is {_short(now)} here and {_short(before)} there"
        for flag in {**saved, **run}
        for before, now in [_only_differences(saved.get(flag), run.get(flag))]
        if before != now
    ]
    if different:
        raise SystemExit(
            f"--resume: {place} is of another run: {'; '.join(different)}. Give the values it was started with, or "
            "another --output"
        )


def _only_differences(before: object, now: object) -> tuple[object, object]:
    """Of two dicts, the entries that are not in both."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    missing = object()
    keys = [k for k in {**before, **now} if before.get(k, missing) != now.get(k, missing)]
    return {k: before[k] for k in keys if k in before}, {k: now[k] for k in keys if k in now}


def _short(value: object) -> str:
    return text if len(text := json.dumps(value)) < 200 else text[:197] + "..."
