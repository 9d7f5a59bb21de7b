#!/usr/bin/env python3
"""Evaluate a HF model directory: the eight commonsense tasks, perplexity of text, tasks of lm-evaluation-harness.

    torchrun --nproc-per-node 8 launch/evaluate.py runs/fira/model --data LLM-Adapters/dataset --output fira.json
    python launch/evaluate.py runs/fira/model --text 'c4/c4-validation.*.json.gz' --seq-len 256
    python launch/evaluate.py runs/fira/model --harness arc_easy hellaswag

Every process holds the whole model; batches are dealt to them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.commonsense import TASKS, load_task
from launch.data import cut_blocks, find_files, token_cache
from launch.evaluation import perplexity
from launch.harness import run_harness
from launch.processes import Processes, find_processes, limit_waits, timeout_of
from launch.records import TEMPLATES
from launch.run import versions
from launch.scoring import Judge, accuracy
from launch.tokenizer import load_tokenizer
from lowrank_ds.checkpoint.rotation import replace_text

DEFAULTS = {
    "scoring": "likelihood", "template": "llm-adapters", "beams": 4, "new_tokens": 32,
    "text_key": "text", "seq_len": 256, "cache_dir": ".cache/tokens",
}  # fmt: skip
NEEDED = {  # flag: one of these must be given, too
    **dict.fromkeys(("tasks", "predictions", "scoring", "template", "beams", "new_tokens"), ("data",)),
    **dict.fromkeys(("text_key", "seq_len", "eval_tokens", "cache_dir"), ("text",)),
    "limit": ("data", "harness"), "harness_path": ("harness",),
}  # fmt: skip
LEAST = {"batch_size": 1, "beams": 1, "new_tokens": 1, "limit": 1, "seq_len": 2, "eval_tokens": 1}
COLUMNS = ("task", "questions", "accuracy", "+-", "chance", "unanswered")


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description="Evaluate a HF causal LM.")
    parser.add_argument("model", help="HF model directory, such as RUN/model")
    add = parser.add_argument
    add("--adapter", metavar="DIR", help="PEFT adapter put on the model first")
    add("--tokenizer", help="HF tokenizer directory (default: the model's)")
    add("--dtype", choices=["fp32", "bf16"], help="default: bf16 on GPUs, fp32 on CPUs")
    add("--batch-size", type=int, default=16, help="rows at once, per process (default 16)")
    add("--output", metavar="FILE", help="write the results as JSON")
    add("--predictions", metavar="FILE", help="write every answer, one JSON object a line")
    add(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long a process waits for the others (default: torch's own)",
    )
    add = parser.add_argument_group("commonsense tasks").add_argument
    add("--data", type=Path, metavar="DIR", help="folder with TASK/test.json, such as LLM-Adapters' dataset/")
    add("--tasks", nargs="+", choices=[*TASKS, "all"], metavar="TASK", help="default all: "
        f"{', '.join(TASKS)}")  # fmt: skip
    add("--scoring", choices=["likelihood", "generation"], help="likelihood (default): the "
        "likeliest of the options an instruction allows; generation: the first option in what the model writes, as "
        "published")  # fmt: skip
    add("--template", choices=sorted(TEMPLATES), help="as in training (default llm-adapters)")
    add("--beams", type=int, help="of --scoring generation (default 4)")
    add("--new-tokens", type=int, help="of --scoring generation (default 32)")
    add("--limit", type=int, help="only so many questions of each task, also of --harness")
    add = parser.add_argument_group("perplexity").add_argument
    add("--text", nargs="+", metavar="FILE", help="text in pretrain.py's formats")
    add("--text-key", help="of JSON files (default text)")
    add("--seq-len", type=int, help="tokens of a sequence (default 256)")
    add("--eval-tokens", type=int, help="only so many tokens")
    add("--cache-dir", help="where tokenised text is kept (default .cache/tokens)")
    add = parser.add_argument_group("lm-evaluation-harness").add_argument
    add(
        "--harness",
        nargs="+",
        metavar="TASK",
        help="its tasks (needs pip install 'lowrank_ds[eval]' and its data sets)",
    )
    add("--harness-path", metavar="DIR", help="folder with more of its tasks (YAML files)")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed and checked flags."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.data or args.text or args.harness):
        parser.error("give what to evaluate: --data DIR, --text FILES or --harness TASKS")
    if args.data and not args.data.is_dir():
        parser.error(f"--data {args.data}: no such folder")
    if args.harness_path and not Path(args.harness_path).is_dir():
        parser.error(f"--harness-path {args.harness_path}: no such folder")
    if args.adapter and not Path(args.adapter, "adapter_config.json").exists():
        parser.error(f"--adapter {args.adapter}: no adapter_config.json in there; give a folder that PEFT wrote")
    _check_flags(parser, args)
    tasks = args.tasks or ["all"]
    args.tasks = list(TASKS) if "all" in tasks else list(dict.fromkeys(tasks))
    if not Path(args.model, "config.json").exists():
        parser.error(f"{args.model}: no config.json in there; give a HF model directory (--adapter for PEFT's)")
    return args


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that nothing would read, and numbers that are too small; fill in defaults."""
    for name, needed in NEEDED.items():
        if getattr(args, name) is not None and not any(getattr(args, each) for each in needed):
            parser.error(f"--{name.replace('_', '-')} needs {' or '.join('--' + each for each in needed)}")
    for name in ("beams", "new_tokens"):
        if getattr(args, name) is not None and args.scoring != "generation":
            parser.error(f"--{name.replace('_', '-')} is for --scoring generation")
    for name, least in LEAST.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def load_model(args, device: torch.device) -> torch.nn.Module:
    """The model in evaluation mode, with --adapter on it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    return model.to(device).eval()


def check_fit(args, tokenizer, model: torch.nn.Module) -> int:
    """Most tokens the model reads.

    Raises:
        SystemExit: the tokenizer, --seq-len or --new-tokens asks for more than the model has.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise SystemExit(
            f"--tokenizer {args.tokenizer or args.model} has {len(tokenizer)} tokens, more than the {rows} of "
            f"{args.model}"
        )
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    if args.text and args.seq_len > context:
        raise SystemExit(f"--seq-len {args.seq_len} exceeds max_position_embeddings {context} of {args.model}")
    if args.data and args.scoring == "generation" and args.new_tokens >= context:
        raise SystemExit(
            f"--new-tokens {args.new_tokens}: {args.model} reads {context} tokens at most, and the prompt needs some"
        )
    return context


def commonsense(args, judge: Judge, predictions: list[dict]) -> dict[str, dict]:
    """{task: results}; answers are added to `predictions`."""
    tasks = {task: load_task(args.data, task, args.template, args.limit) for task in args.tasks}  # all, before any runs
    results = {}
    for task, questions in tasks.items():
        if args.scoring == "likelihood":
            scored = judge.likelihood(questions)
        else:
            scored = judge.generation(task, questions, args.beams, args.new_tokens)
        results[task] = accuracy(questions, scored)
        for number, (q, chosen, detail) in enumerate(zip(questions, scored.chosen, scored.detail, strict=True), 1):
            predictions.append({"task": task, "record": number, "answer": q.answer, "chosen": chosen, "detail": detail})
        if judge.processes.is_main:
            print(f"{task}: {100 * results[task]['accuracy']:.1f} % of {len(questions)}", flush=True)
    return results


def text_perplexity(args, model: torch.nn.Module, tokenizer, processes: Processes) -> dict[str, float]:
    """Of --text, cut into sequences as pretrain.py does."""
    tokens = token_cache(find_files(args.text, "--text"), tokenizer, args.text_key, args.cache_dir)
    blocks = cut_blocks(tokens, args.seq_len, "--text", args.eval_tokens)
    found = perplexity(lambda ids: model(ids).logits, blocks, processes.rank, processes.world, processes.device)
    return {"perplexity": found, "tokens": blocks.size}


def table(results: dict) -> str:
    """What the terminal shows; the average is over tasks, as published."""
    lines = []
    if tasks := results.get("commonsense"):
        rows = [COLUMNS] + [
            (name, f"{t['questions']}", f"{100 * t['accuracy']:.1f}", f"{100 * t['stderr']:.1f}",
             f"{100 * t['chance']:.1f}", f"{t['unanswered']}")
            for name, t in tasks.items()
        ]  # fmt: skip
        rows.append(("average", "", f"{100 * results['average']:.1f}", "", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines += [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
    if text := results.get("text"):
        lines.append(f"perplexity {text['perplexity']:.3f} of {text['tokens']:,} tokens")
    for task, metrics in (results.get("harness") or {}).items():
        lines.append(f"harness {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    args = parse()
    processes, start = find_processes(), time.perf_counter()
    if args.harness and processes.world > 1 and processes.device.type == "cpu":
        raise SystemExit("--harness: on CPUs lm-evaluation-harness deals nothing to processes; start one process only")
    if processes.world > 1:
        dist.init_process_group("nccl" if processes.device.type == "cuda" else "gloo", **timeout_of(args.timeout))
        limit_waits(args.timeout)
    for file in filter(None, (args.output, args.predictions) if processes.is_main else ()):
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # an error comes now, not after hours of work
    args.dtype = args.dtype or ("bf16" if processes.device.type == "cuda" else "fp32")
    results: dict = {"model": args.model, "adapter": args.adapter, "dtype": args.dtype}
    predictions: list[dict] = []
    if args.data or args.text:
        tokenizer = load_tokenizer(args.tokenizer or args.model)
        model = load_model(args, processes.device)
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        context = check_fit(args, tokenizer, model)
        judge = Judge(model, tokenizer, processes, args.batch_size, context, pad)
    if args.data:
        found = commonsense(args, judge, predictions)
        average = sum(t["accuracy"] for t in found.values()) / len(found)
        results |= {"scoring": args.scoring, "template": args.template, "commonsense": found, "average": average}
    if args.text:
        results["text"] = text_perplexity(args, model, tokenizer, processes)
    if args.harness:
        results["harness"] = run_harness(args, processes.device)
    if processes.is_main:
        print(table(results), flush=True)
        results |= {"seconds": time.perf_counter() - start, "world_size": processes.world, "versions": versions()}
        if args.output:
            replace_text(Path(args.output), json.dumps(results, indent=2) + "\n")
        if args.predictions:
            replace_text(Path(args.predictions), "".join(json.dumps(p) + "\n" for p in predictions))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
