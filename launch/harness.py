"""EleutherAI's lm-evaluation-harness, where it is installed: its tasks, its code, our table."""

import torch


def run_harness(args, device: torch.device) -> dict[str, dict[str, float]] | None:
    """{task: {metric: value}} of --harness; None on all processes but the first.

    Raises:
        SystemExit: the harness is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit(
            f"--harness needs lm-evaluation-harness (no module {error.name!r}): pip install 'lowrank_ds[eval]'. The "
            "eight commonsense tasks (--data) and --text need nothing"
        ) from None
    manager = TaskManager(include_path=args.harness_path)
    known = set(manager.all_tasks)
    unknown = [task for task in args.harness if task not in known]
    if unknown:
        raise SystemExit(
            f"--harness {' '.join(unknown)}: the installed lm-evaluation-harness has no such task (lm_eval ls tasks); "
            "your own are found in --harness-path DIR"
        )
    model = {"pretrained": args.model, "dtype": {"bf16": "bfloat16", "fp32": "float32"}[args.dtype]}
    if args.tokenizer:
        model["tokenizer"] = args.tokenizer
    if args.adapter:
        model["peft"] = args.adapter
    found = lm_eval.simple_evaluate(
        model="hf", model_args=model, tasks=args.harness, batch_size=args.batch_size, limit=args.limit,
        device=str(device), task_manager=manager,
    )  # fmt: skip
    if found is None:
        return None
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }
