"""Evaluation: answers as LLM-Adapters reads them, likelihoods against plain sums, and any number of processes."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import evaluate
from launch.commonsense import TASKS, extract_answer, load_task, options_of
from launch.evaluation import exp_mean
from launch.processes import Processes
from launch.records import RecordError
from launch.scoring import Judge
from launch.tokenizer import load_tokenizer
from tests import commonsense, pretraining

CPU = torch.device("cpu")
ALONE = Processes(0, 1, 0, CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, model, records, and `tuned`: the model fine-tuned on them for some seconds."""
    folder = commonsense.prepare(tmp_path_factory.mktemp("data") / "commonsense")
    flags = commonsense.flags(
        folder,
        folder / "run",
        "--optimizer",
        "AdamW",
        "--steps",
        60,
        "--batch-size",
        16,
        "--micro-batch",
        16,
        "--lr",
        0.015,
        "--template",
        "plain",
        "--log-every",
        20,
        "--seed",
        1,
    )
    codes, printed = pretraining.run(1, flags, folder / "log", program="finetune")
    assert codes == [0], printed[-3000:]
    return folder


def judge_of(folder: Path, batch: int) -> Judge:
    """A model that is asked in this process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Judge(model, load_tokenizer(str(folder)), ALONE, batch, 256, 2)


def evaluated(world: int, output: Path, *arguments: Any) -> tuple[dict, str]:
    """(JSON, what was printed) of evaluate.py."""
    given = [str(a) for a in [*arguments, "--output", output]]
    codes, printed = pretraining.run(world, given, output.with_suffix(".log"), program="evaluate")
    assert codes == [0] * world, printed[-3000:]
    return json.loads(output.read_text()), printed


# --- the format ------------------------------------------------------
def test_answers_are_read_as_llm_adapters_does() -> None:
    """The first of the task's words, anywhere, in lower case; none: ""."""
    assert extract_answer("boolq", " the correct answer is false, not true") == "false"
    assert extract_answer("piqa", "solution2") == "solution2"
    assert extract_answer("ARC-Easy", "the correct answer is answer5") == "answer5"
    assert extract_answer("winogrande", "Option1 or so") == ""
    assert set(TASKS) == set(commonsense.ASKED)


def test_options_of_an_instruction() -> None:
    """Those of its last line; without one, those it mentions; else all of the task."""
    assert options_of("Q\n\nAnswer1: x Answer2: y Answer3: z\n\nAnswer format: answer1/answer2", "ARC-Easy") == (
        "answer1",
        "answer2",
    )
    assert options_of("Q Answer1: x Answer2: y Answer3: z", "social_i_qa") == ("answer1", "answer2", "answer3")
    assert options_of("Q", "hellaswag") == TASKS["hellaswag"]
    assert options_of("Q Answer format: A/B", "piqa") == TASKS["piqa"]


def test_bad_data_is_named(tmp_path: Path) -> None:
    """A missing task tells which are there; an answer that is no option tells which are."""
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.json").write_text(json.dumps([{**commonsense.record("piqa", 0), "answer": "a"}]))
    with pytest.raises(RecordError, match=r"record 1: 'answer' is 'a', which is none of solution1, solution2"):
        load_task(tmp_path, "piqa", "llm-adapters", None)
    with pytest.raises(RecordError, match=r"no boolq/test.json in there \(found: piqa\)"):
        load_task(tmp_path, "boolq", "llm-adapters", None)


# --- scores ----------------------------------------------------------
def test_likelihood_is_the_sum_over_the_answers_tokens(data: Path) -> None:
    """Against one option at a time, token by token; in batches of any size."""
    judge = judge_of(data / "model", 7)
    questions = load_task(data / "dataset", "social_i_qa", "llm-adapters", None)
    scored = judge.likelihood(questions)
    for question, scores in zip(questions, scored.detail, strict=True):
        for option in question.options:
            text = question.prompt + "the correct answer is " + option
            ids = [1, *judge.tokenizer(text, add_special_tokens=False)["input_ids"]]
            ends = judge.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            with torch.no_grad():
                logs = judge.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            own = [i for i, (_, end) in enumerate(ends, 1) if end > len(question.prompt)]
            assert scores[option] == pytest.approx(sum(logs[i - 1, ids[i]].item() for i in own), rel=1e-5)
    assert scored.chosen == [max(s, key=s.get) for s in scored.detail]


def test_a_model_that_gives_no_number_has_no_accuracy(data: Path) -> None:
    """The first option of every question is not an answer."""
    judge = judge_of(data / "model", 4)
    with torch.no_grad():
        judge.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(SystemExit, match="likelihood of 10 of 10 answers is nan"):
        judge.likelihood(load_task(data / "dataset", "piqa", "plain", None))


def test_what_the_model_has_not_is_refused(data: Path) -> None:
    """More tokens than embeddings, sequences or answers longer than the context."""
    judge, place = judge_of(data / "model", 4), str(data / "model")

    def check(*flags: str, more: int = 0) -> int:
        tokenizer = range(len(judge.tokenizer) + more)
        return evaluate.check_fit(evaluate.parse([place, *flags]), tokenizer, judge.model)

    assert check("--text", "t", "--seq-len", "256") == 256
    with pytest.raises(SystemExit, match=f"331 tokens, more than the 330 of {place}"):
        check("--text", "t", more=1)
    with pytest.raises(SystemExit, match="--seq-len 257 exceeds max_position_embeddings 256"):
        check("--text", "t", "--seq-len", "257")
    with pytest.raises(SystemExit, match="--new-tokens 256: .* reads 256 tokens at most"):
        check("--data", str(data), "--scoring", "generation", "--new-tokens", "256")


def test_commonsense(data: Path, tmp_path: Path) -> None:
    """The tuned model answers rightly, the untrained one does not; two processes say what one does."""
    asked = ("--data", data / "dataset", "--template", "plain", "--batch-size", 6)
    base = (data / "run" / "model", *asked)
    one, printed = evaluated(1, tmp_path / "one.json", *base, "--predictions", tmp_path / "one.jsonl")
    two, _ = evaluated(2, tmp_path / "two.json", *base, "--predictions", tmp_path / "two.jsonl")
    assert one["commonsense"] == two["commonsense"] and set(one["commonsense"]) == set(TASKS)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    wild, _ = evaluated(1, tmp_path / "wild.json", data / "model", *asked)
    print("\n" + printed, f"untrained: {wild['average']:.2f}")
    easy = ("boolq", "piqa", "winogrande")
    assert all(one["commonsense"][task]["accuracy"] == 1 for task in easy)
    assert one["average"] > 0.7 > 0.5 > wild["average"]
    assert "average" in printed and "ARC-Challenge" in printed
    written, _ = evaluated(2, tmp_path / "gen.json", *base, "--scoring", "generation", "--tasks", "winogrande",
                           "--beams", 2, "--new-tokens", 24)  # fmt: skip
    found = written["commonsense"]
    assert set(found) == {"winogrande"} and written["average"] == 1
    assert all(task["unanswered"] == 0 for task in found.values())


def test_adapter(data: Path, tmp_path: Path) -> None:
    """The same answers, and likelihoods within rounding, as the model into which it was merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(data / "model"), LoraConfig(r=4, lora_alpha=8))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_tokenizer(str(data / "model")).save_pretrained(tmp_path / "merged")
    details = []
    asked = ("--data", data / "dataset", "--tasks", "piqa", "--predictions")
    own, adapter = (data / "model",), ("--adapter", tmp_path / "adapter")
    for name, given in {"merged": (tmp_path / "merged",), "adapter": (*own, *adapter), "without": own}.items():
        evaluated(1, tmp_path / f"{name}.json", *given, *asked, tmp_path / f"{name}.jsonl")
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        details.append(torch.tensor([[row["detail"][o] for o in TASKS["piqa"]] for row in rows]))
    torch.testing.assert_close(details[1], details[0], rtol=1e-5, atol=1e-5)
    assert (details[2] - details[0]).abs().max() > 0.1


def test_perplexity_of_text(data: Path, tmp_path: Path) -> None:
    """Against a plain sum; two processes give the same bits."""
    texts = [commonsense.record("piqa", i % 2)["instruction"] for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    base = (data / "model", "--text", tmp_path / "text.jsonl", "--seq-len", 32, "--cache-dir", tmp_path)
    one, printed = evaluated(1, tmp_path / "one.json", *base)
    two, _ = evaluated(2, tmp_path / "two.json", *base)
    assert one["text"] == two["text"] and "perplexity" in printed
    judge = judge_of(data / "model", 1)
    ids = [i for t in texts for i in [1, *judge.tokenizer(t, add_special_tokens=False)["input_ids"], 2]]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        mean = judge.model(blocks, labels=blocks).loss.item()
    assert one["text"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert one["text"]["tokens"] == blocks.numel()


def test_a_perplexity_that_is_no_float_is_infinite() -> None:
    """Python's exp raises from 710 on; a run's evaluation goes on and says inf."""
    assert exp_mean(torch.tensor([1.0, 3.0]), 2) == pytest.approx(math.exp(2))
    assert exp_mean(torch.tensor([1500.0]), 2) == math.inf


# --- flags and the harness -------------------------------------------
def test_wrong_flags(data: Path, capsys: pytest.CaptureFixture) -> None:
    """The message names the flag."""
    for arguments, message in (
        ([str(data / "model")], "give what to evaluate"),
        ([str(data / "model"), "--data", "/nonexistent"], "--data /nonexistent: no such folder"),
        ([str(data), "--harness", "a", "--harness-path", "/nonexistent"], "--harness-path /nonexistent: no such fold"),
        ([str(data), "--data", str(data)], "no config.json"),
        ([str(data / "model"), "--data", str(data), "--batch-size", "0"], "--batch-size must be at least 1"),
        ([str(data / "model"), "--text", "t", "--eval-tokens", "-5"], "--eval-tokens must be at least 1"),
        ([str(data / "model"), "--text", "t", "--seq-len", "1"], "--seq-len must be at least 2"),
        ([str(data / "model"), "--text", "t", "--tasks", "boolq"], "--tasks needs --data"),
        ([str(data / "model"), "--text", "t", "--predictions", "p"], "--predictions needs --data"),
        ([str(data / "model"), "--text", "t", "--limit", "3"], "--limit needs --data or --harness"),
        ([str(data / "model"), "--data", str(data), "--seq-len", "8"], "--seq-len needs --text"),
        ([str(data / "model"), "--data", str(data), "--beams", "2"], "--beams is for --scoring generation"),
        ([str(data / "model"), "--text", "t", "--adapter", str(data)], "no adapter_config.json in there"),
    ):
        with pytest.raises(SystemExit):
            evaluate.parse(arguments)
        assert message in capsys.readouterr().err


def test_harness_on_several_cpus(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask every process everything."""
    several = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(data / "model"), "--harness", "arc_easy"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="start one process only"):
        evaluate.main()


def test_harness(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent: how to install it. Present (a stand-in with its interface): our model goes in, its numbers come out."""
    args = evaluate.parse([str(data / "model"), "--harness", "arc_easy", "--limit", "3"])
    args.dtype = "fp32"
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"pip install 'lowrank_ds\[eval\]'"):
        evaluate.run_harness(args, CPU)
    given: dict = {}

    def simple_evaluate(**arguments: Any) -> dict:
        given.update(arguments)
        return {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}}

    harness, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    harness.simple_evaluate, harness.tasks = simple_evaluate, tasks
    tasks.TaskManager = lambda include_path: types.SimpleNamespace(all_tasks=["arc_easy"])
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    assert evaluate.run_harness(args, CPU) == {"arc_easy": {"acc": 0.5, "acc_stderr": 0.1}}
    assert given["device"] == "cpu"  # the harness's own default is cuda, also where there is none
    assert given["model_args"] == {"pretrained": str(data / "model"), "dtype": "float32"} and given["limit"] == 3
    args.tokenizer = "other"
    evaluate.run_harness(args, CPU)
    assert given["model_args"]["tokenizer"] == "other", "its own default is the model's"
    args.harness = ["nothing"]
    with pytest.raises(SystemExit, match="--harness nothing: .* has no such task"):
        evaluate.run_harness(args, CPU)
