"""Fine-tuning: what counts as an answer, packing, LoRA merged as PEFT does, and the same weights from every engine."""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch import finetune
from launch.examples import (
    InstructionBatches,
    cached_examples,
    collate,
    encode,
    fingerprint_examples,
    load_examples,
    pack,
)
from launch.finetune_options import count_steps, parse
from launch.losses import IGNORED, forward_loss, model_inputs, token_losses
from launch.optimizers import warmup_then
from launch.options import BatchPlan
from launch.records import RecordError, prompt_of, read_records, segments_of
from launch.tokenizer import load_tokenizer
from tests import commonsense, pretraining
from tests.training import largest_difference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, model and records."""
    return commonsense.prepare(tmp_path_factory.mktemp("data") / "commonsense")


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    """The tiny model's."""
    return load_tokenizer(str(data / "model"))


@pytest.fixture(scope="module")
def model(data: Path) -> torch.nn.Module:
    """The tiny model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(data / "model")


def examples_of(data: Path, tokenizer: Any, **more: Any) -> list:
    """Examples of train.json."""
    given = {"template": "llm-adapters", "limit": 256, "train_on_inputs": False, **more}
    return load_examples([data / "train.json"], tokenizer, **given).examples


# --- records ---------------------------------------------------------
def test_template_is_llm_adapters() -> None:
    """Byte for byte, from the prompt that Fira's fine_tuning/finetune.py trains on; braces in a record are text."""
    i = " " * 16
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        f"\n{i}### Instruction:\n{i}Say {{input}}.\n{i}\n{i}### Response:\n{i}"
    )
    assert prompt_of("", {"instruction": "Say {input}.", "input": ""}, "llm-adapters") == expected
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request. \n\n{i}### Instruction:\n{i}Add.\n{i}\n{i}### Input:\n"
        f"{i}1 {{instruction}}\n{i}\n{i}### Response:\n{i}"
    )
    assert prompt_of("", {"instruction": "Add.", "input": "1 {instruction}"}, "llm-adapters") == expected
    expected = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    assert prompt_of("", {"instruction": "Add."}, "alpaca").endswith(expected)


GOOD = {"instruction": "a", "input": "", "output": "b", "answer": "c"}
TURNS = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant"}]}
BAD = {
    "no output": ([GOOD, {"instruction": "a"}], r"record 2: has no key 'output'; its keys are \['instruction'\]"),
    "empty output": ([{**GOOD, "output": " "}], "record 1: 'output' is empty"),
    "a number": ([{**GOOD, "instruction": 3}], "record 1: 'instruction' is int, not text"),
    "a list": ([GOOD, GOOD, ["a"]], "record 3: is list, not an object"),
    "unknown": ([{"text": "a"}], r"record 1: has none of the keys 'instruction' .* its keys are \['text'\]"),
    "null": ([{**GOOD, "output": None}], "record 1: 'output' is null, not text"),
    "another encoding": ('[{"prompt": "\udce9"}]', "is not UTF-8 text"),
    "no completion": ([{"prompt": "a"}], "record 1: has no key 'completion'"),
    "no content": ([TURNS], "record 1, message 2: has no key 'content'"),
    "no answer": ([{"messages": [{"role": "user", "content": "hi"}]}], "record 1: .* no message whose role is 'assist"),
    "broken": ('[{"instruction": ', "not a valid JSON list"),
    "broken line": ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', "file.json:2: not one JSON object a line"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """File, record or line, and key."""
    content, message = BAD[name]
    path = tmp_path / "file.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    tokenizer.chat_template = commonsense.CHAT
    with pytest.raises(RecordError, match=message) as error:
        load_examples([path], tokenizer, "llm-adapters", 256, False)
    assert str(path) in str(error.value)


def test_files_without_records_say_so(tmp_path: Path, tokenizer: Any) -> None:
    """--seq-len has nothing to do with it. A byte-order mark is no record either."""
    path = tmp_path / "file.json"
    for content in ("", "[]", "\n\n"):
        path.write_text(content)
        with pytest.raises(SystemExit, match="file.json: no records in there"):
            load_examples([path], tokenizer, "plain", 256, False)
    path.write_text(json.dumps([GOOD]), encoding="utf-8-sig")
    assert len(load_examples([path], tokenizer, "plain", 256, False).examples) == 1


def test_all_file_forms_hold_the_same(tmp_path: Path) -> None:
    """A list, lines, compressed lines, parquet."""
    from pyarrow import Table, parquet

    rows = [{**GOOD, "output": str(i)} for i in range(3)]
    (tmp_path / "a.json").write_text("\n " + json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "d.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert [record for _, record in read_records(path)] == rows, path


def test_records_are_tokenised_once(data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The same examples from the cache; what decides them decides its name; a bad record leaves none."""
    files, how = [data / "train.json"], ("llm-adapters", 200, False)
    cache = str(tmp_path / "cache")
    first = cached_examples(files, tokenizer, *how, cache)
    monkeypatch.setattr("launch.examples.encode", None)
    again, plain = cached_examples(files, tokenizer, *how, cache), load_examples
    assert (again.cut, again.dropped) == (first.cut, first.dropped) and first.cut and first.dropped
    assert fingerprint_examples(again.examples) == fingerprint_examples(first.examples)
    monkeypatch.undo()
    assert fingerprint_examples(first.examples) == fingerprint_examples(plain(files, tokenizer, *how).examples)
    tokenizer.chat_template = "a"
    for other in (("plain", 200, False), ("llm-adapters", 190, False), ("llm-adapters", 200, True), how):
        cached_examples(files, tokenizer, *other, cache)
    tokenizer.chat_template = commonsense.CHAT
    (tmp_path / "bad.json").write_text('[{"instruction": "a"}]')
    for _ in range(2):
        with pytest.raises(RecordError, match="has no key 'output'"):
            cached_examples([tmp_path / "bad.json"], tokenizer, *how, cache)
    assert len(list(Path(cache).glob("*.examples"))) == 5


# --- which tokens count ----------------------------------------------
def counted(
    tokenizer: Any, segments: list, limit: int = 256, inputs: bool = False, ends: bool = True
) -> tuple[str, str]:
    """(whole text, text of the tokens that count)."""
    ((example, _),) = encode([(segments, ends)], tokenizer, limit, inputs)
    ids = [int(i) for i in example.ids]
    labels = [int(i) for i in example.labels if i != IGNORED]
    assert all(label in (IGNORED, i) for label, i in zip(example.labels, ids, strict=True))
    return tokenizer.decode(ids), tokenizer.decode(labels)


def test_only_answers_count(tokenizer: Any) -> None:
    """And the end-of-text mark after them; with --train-on-inputs everything but the beginning mark."""
    record = commonsense.record("boolq", 0)
    segments = segments_of("", record, "llm-adapters", None)
    whole, answer = counted(tokenizer, segments)
    assert answer.strip() == "the correct answer is true</s>" and whole.endswith("the correct answer is true</s>")
    assert counted(tokenizer, segments, inputs=True)[1] == whole.removeprefix("<s>").lstrip()
    ((cut, was_cut),) = encode([(segments, True)], tokenizer, 20, False)
    assert was_cut and len(cut.ids) == 20 and cut.trained == 0
    assert counted(tokenizer, [("one ", False), ("two", True)])[1].strip() == "two</s>"
    assert counted(tokenizer, [("one ", False), ("two</s>", True)])[1].strip() == "two</s>", "not ended twice"


def test_chat_counts_every_turn_of_the_assistant(tokenizer: Any) -> None:
    """A template that rewrites earlier turns is refused; so is a tokenizer without one."""
    said = [("system", "be kind"), ("user", "hi"), ("assistant", "sun"), ("user", "more"), ("assistant", "moon")]
    record = {"messages": [{"role": role, "content": text} for role, text in said]}
    tokenizer.chat_template = commonsense.CHAT
    segments = segments_of("", record, "plain", tokenizer.apply_chat_template)
    assert [text for text, answer in segments if answer] == ["sun</s>", "moon</s>"]
    assert counted(tokenizer, segments, ends=False)[1].split() == ["sun</s>moon</s>"]
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(RecordError, match="FILE, record 1: the chat template rewrites earlier turns"):
        segments_of("FILE, record 1", record, "plain", tokenizer.apply_chat_template)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RecordError, match="template refuses these messages: roles must alternate"):
        segments_of("FILE, record 1", record, "plain", tokenizer.apply_chat_template)
    with pytest.raises(RecordError, match="give --chat-template FILE"):
        segments_of("FILE, record 1", record, "plain", None)


# --- batches ---------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(data: Path, tokenizer: Any, model: Any, attention: str) -> None:
    """The loss of each token is that of its example alone, padded or packed."""
    examples = examples_of(data, tokenizer, template="plain")[:7]
    rows = pack(examples, 256, seed=1)
    assert sorted(n for row in rows for n in row) == list(range(7)) and len(rows) < 7
    model.set_attn_implementation(attention)
    alone = [model_losses(model, collate([[e]], 0, packed=False)).sum() for e in examples]
    packed = model_losses(model, collate([[examples[n] for n in row] for row in rows], 0, packed=True)).sum(dim=1)
    expected = torch.stack([sum(alone[n] for n in row) for row in rows])
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    padded = model_losses(model, collate([[e] for e in examples], 0, packed=False)).sum(dim=1)
    torch.testing.assert_close(padded, torch.stack(alone), rtol=1e-5, atol=1e-5)


def model_losses(model: Any, batch: dict) -> torch.Tensor:
    """[rows, length - 1] losses."""
    return token_losses(model.eval()(**model_inputs(batch, CPU)).logits, batch["labels"]).double()


def test_packing_is_refused_where_examples_would_see_each_other(model: Any) -> None:
    """OPT takes position_ids and attends across them, without a word."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    opt = OPTForCausalLM(OPTConfig(vocab_size=64, num_attention_heads=2, **sizes)).eval()

    def check(of: torch.nn.Module) -> None:
        finetune.check_packing(Namespace(model="m"), Namespace(logits=lambda b: of(**model_inputs(b, CPU)).logits))

    check(model.eval())
    with pytest.raises(SystemExit, match="--packing: m lets the examples of a row see each other"):
        check(opt)


def test_every_trained_token_weighs_the_same(data: Path, tokenizer: Any, model: Any) -> None:
    """The gradient of a step does not depend on how it is dealt to processes and micro-batches."""
    examples = examples_of(data, tokenizer)
    gradients = []
    for micro, accumulation, world in ((12, 1, 1), (2, 3, 2), (1, 4, 3)):
        model.zero_grad()
        for rank in range(world):
            plan = BatchPlan(12, micro, accumulation, world)
            batches = InstructionBatches(examples, plan, rank, 0, pad=0, length=None)
            for batch in batches.at(3):
                (forward_loss(model, batch, CPU) / (accumulation * world)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 1e-5 * gradients[0].abs().max()


# --- flags -----------------------------------------------------------
WRONG = {
    "--steps 3 --epochs 2": "either --steps N or --epochs N",
    "--steps 3 --lora-rank 4": "--lora-rank is for --method lora or lorafa",
    "--steps 3 --method lorafa --rank 4": "the rank of --method lorafa is --lora-rank",
    "--steps 3 --method lorafa --optimizer AdamW": "trained by LoRAFA, not AdamW",
    "--steps 3 --method lora --optimizer AdamW --embed-lr 1": "trains adapters only",
    "--steps 3 --keep best --optimizer AdamW": "--keep best needs --eval-every",
    "--steps 3 --valid-size 0": "--valid-size is a number of records",
    "--steps 3 --min-lr-ratio 2 --optimizer AdamW": "--min-lr-ratio must be in [0, 1]",
    "--steps 3 --log-every 0 --optimizer AdamW": "--log-every must be at least 1",
    "--steps 3 --batch-size 0 --optimizer AdamW": "--batch-size must be at least 1",
    "--steps 3 --seq-len 1 --optimizer AdamW": "--seq-len must be at least 2",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_flags(line: str, capsys: pytest.CaptureFixture) -> None:
    """The message names the flag."""
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--train-data", "t", "--output", "/nonexistent/run", *line.split()])
    assert WRONG[line] in capsys.readouterr().err


def test_epochs() -> None:
    """Rounded up to whole steps; warm-up is a tenth."""
    given = ["--model", "m", "--train-data", "t", "--output", "/nonexistent/run", "--optimizer", "AdamW"]
    args = parse([*given, "--epochs", "3"])
    count_steps(args, rows=170, batch=16)
    assert (args.steps, args.warmup_steps) == (32, 3)


def test_linear_schedule_is_transformers() -> None:
    """From the end of the warm-up on; --min-lr-ratio lifts its end."""
    from transformers import get_linear_schedule_with_warmup

    theirs = get_linear_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], lr=1.0), 3, 20).lr_lambdas[0]
    ours = warmup_then("linear", 20, 3, 0.0)
    assert [ours(step) for step in range(3, 21)] == pytest.approx([theirs(step) for step in range(3, 21)])
    assert [ours(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    given = [
        "--model",
        "m",
        "--train-data",
        "t",
        "--output",
        "/nonexistent/run",
        "--optimizer",
        "AdamW",
        "--steps",
        "9",
    ]
    assert [parse([*given, *more]).min_lr_ratio for more in ([], ["--schedule", "linear"])] == [0.1, 0.0]
    lifted = parse([*given, "--schedule", "linear", "--min-lr-ratio", "0.2"])
    assert warmup_then(lifted.schedule, 20, 3, lifted.min_lr_ratio)(20) == pytest.approx(0.2)


# --- runs ------------------------------------------------------------
def run(data: Path, output: Path, world: int, *more: Any, code: int = 0) -> str:
    """What finetune.py printed."""
    arguments = commonsense.flags(data, output, *more)
    codes, printed = pretraining.run(world, arguments, output.with_suffix(".log"), program="finetune")
    assert codes == [code] * world, printed[-3000:]
    return printed


def weights(output: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    """Of a HF directory."""
    return load_file(output / folder / "model.safetensors")


FIRA = ("--optimizer", "FiraAdamW", "--rank", 8, "--optimizer-args", '{"update_proj_gap": 3}')
LORAFA = ("--method", "lorafa", "--lora-rank", 6, "--lora-alpha", 12, "--lora-dropout", 0)


def zero(data: Path, stage: int, optimizer: str) -> Path:
    """A ds_config with this optimizer, whose parameters the command line gives."""
    config = json.loads((pretraining.ROOT / "ds_configs" / f"zero{stage}_fira.json").read_text())
    config["optimizer"] = {"type": optimizer, "params": {}}
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    path = data / f"zero{stage}_{optimizer}.json"
    path.write_text(json.dumps(config))
    return path


def test_full_fine_tuning(data: Path, tmp_path: Path) -> None:
    """Packed, two processes under each engine against one; resumed, bit for bit; the best model is kept."""
    plain = ("--packing", "--template", "plain", "--batch-size", 4, "--micro-batch", 1, "--schedule", "linear")
    more = (*FIRA, *plain, "--eval-every", 1, "--keep", "best")
    printed = run(data, tmp_path / "one", 1, *more, "--save-every", 2, "--scaling-every", 2)
    assert "--train-data: 100 examples" in printed and "FiraAdamW" in printed
    moved = largest_difference(weights(tmp_path / "one"), load_file(data / "model" / "model.safetensors"))
    for engine in ("fsdp2", "fsdp1", "hsdp", "layerwise", "zero1"):
        own = pretraining.ENGINES[engine]
        if own[0] == "--deepspeed_config":
            own = (own[0], zero(data, int(engine[4]), "FiraAdamW"), *own[2:])
        optimizer = FIRA[2:] if engine.startswith("zero") else FIRA
        run(data, tmp_path / engine, 2, *optimizer, *plain, *own)
        apart = largest_difference(weights(tmp_path / "one"), weights(tmp_path / engine))
        print(f"\npacked, {engine} x 2 against one process: {apart:.1e} (moved by {moved:.2g})")
        assert moved > 0.01 and apart < 2e-5, engine
    run(data, tmp_path / "again", 1, *more, "--save-every", 2,
        "--resume", tmp_path / "one" / "checkpoints" / "step-00000002")  # fmt: skip
    first, again = weights(tmp_path / "one"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    records = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    found = [r["perplexity"] for r in records if r["kind"] == "valid"]
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["best_perplexity"] == min(found) and len(found) == 4 and summary["method"] == "full"
    assert [r["lr"] for r in records if r["kind"] == "train"] == pytest.approx([0.01, 0.01, 0.02 / 3, 0.01 / 3])
    assert sum(summary["state_moments_bytes_per_rank"]) > 0 and (tmp_path / "one" / "scaling.jsonl").exists()
    refused = run(data, tmp_path / "one", 1, *more, "--save-every", 2, "--resume", "auto", "--train-on-inputs", code=1)
    assert "--train-data" in refused and "is of another run" in refused


def test_lorafa(data: Path, tmp_path: Path) -> None:
    """Engines end in the same merged model, which is PEFT's merge of the saved adapter; resumed, bit for bit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(data, tmp_path / "one", 1, *LORAFA, "--save-every", 2)
    first = tmp_path / "one" / "checkpoints" / "step-00000002"
    engines = {"fsdp2": ("--engine", "fsdp2"), "fsdp1": ("--engine", "fsdp1"),
               "zero3": ("--deepspeed_config", zero(data, 3, "LoRAFA"))}  # fmt: skip
    for engine, own in engines.items():
        printed = run(data, tmp_path / engine, 2, *LORAFA, *own, "--resume", "auto")
        assert "WARNING: --resume auto without --save-every N: this run saves nothing" in printed
    run(data, tmp_path / "again", 1, *LORAFA, "--save-every", 2, "--resume", first)
    run(data, tmp_path / "resumed", 2, *LORAFA, "--engine", "fsdp2", "--resume", first)
    one = weights(tmp_path / "one")
    before = load_file(data / "model" / "model.safetensors")
    moved = {name: (one[name] - before[name]).abs().max().item() for name in one}
    assert set(one) == set(before)
    assert {name for name, by in moved.items() if by} == {n for n in one if "proj" in n}
    assert all(torch.equal(one[name], again) for name, again in weights(tmp_path / "again").items())
    for engine in (*engines, "resumed"):
        apart = largest_difference(one, weights(tmp_path / engine))
        print(f"\nLoRA-FA, {engine} x 2 against one process: {apart:.1e} (moved by {max(moved.values()):.2g})")
        assert apart < 2e-5
        adapter = load_file(tmp_path / engine / "model" / "adapter" / "adapter_model.safetensors")
        assert len(adapter) == 14 and not any("_fsdp" in name for name in adapter)
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    theirs = PeftModel.from_pretrained(base, tmp_path / "one" / "model" / "adapter").merge_and_unload().state_dict()
    assert largest_difference(one, {name: theirs[name] for name in one}) < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model").state_dict()
    assert all(torch.equal(loaded[name], one[name]) for name in one)


def test_lora_with_any_optimizer(data: Path, tmp_path: Path) -> None:
    """AdamW and Fira on the adapters; a target that is not there, a model without weights, missing data are named."""
    lora = ("--method", "lora", "--lora-rank", 4, "--optimizer", "AdamW", "--steps", 2)
    run(data, tmp_path / "lora", 1, *lora, "--lora-targets", "q_proj", "v_proj", "--lora-dropout", 0)
    before, after = load_file(data / "model" / "model.safetensors"), weights(tmp_path / "lora")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {n for n in after if "q_proj" in n or "v_proj" in n}
    fira = ("--method", "lora", "--lora-rank", 8, "--steps", 2, *FIRA[:2], "--rank", 4)  # Fira's Table 4
    printed = run(data, tmp_path / "fira", 1, *fira)
    assert "FiraAdamW: 14 parameters projected (rank [4]), 0 plain" in printed
    moved = {name for name, w in weights(tmp_path / "fira").items() if not torch.equal(w, before[name])}
    assert moved == {n for n in after if "proj" in n}
    printed = run(data, tmp_path / "bad", 1, *lora, "--lora-targets", "nothing", code=1)
    assert "--lora-targets nothing" in printed
    printed = run(data, tmp_path / "bad", 1, *lora, "--model", tmp_path, "--tokenizer", data / "tokenizer", code=1)
    assert "no *.safetensors" in printed
    printed = run(data, tmp_path / "bad", 1, *lora, "--train-data", tmp_path / "none.json", code=1)
    assert "--train-data" in printed and "no such file" in printed
    assert np.isfinite(json.loads((tmp_path / "lora" / "summary.json").read_text())["perplexity"])
