"""Instruction data: files of records -> texts whose parts are trained or not.

Three forms of a record, told apart by their keys:
    instruction   {"instruction", "input", "output"}: LLM-Adapters' commonsense_170k.json, Alpaca ("answer" is not read)
    completion    {"prompt", "completion"}
    messages      {"messages": [{"role", "content"}, ...]}, rendered by the tokenizer's chat template
Files: one JSON list, or one JSON object a line (.json, .jsonl, both also .gz), or .parquet.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

IN = " " * 16  # LLM-Adapters' template is the body of an indented f-string
_TASK = "Below is an instruction that describes a task"
_WITH = f"{_TASK}, paired with an input that provides further context."
_ASK = "Write a response that appropriately completes the request."

# {name: (for a record with an input, for one without)}
TEMPLATES = {
    # finetune.py of LLM-Adapters, as Fira has it: byte for byte, trailing spaces included
    "llm-adapters": (
        f"{_WITH} {_ASK} \n\n{IN}### Instruction:\n{IN}{{instruction}}\n{IN}\n{IN}### Input:"
        f"\n{IN}{{input}}\n{IN}\n{IN}### Response:\n{IN}",
        f"{_TASK}. {_ASK}  \n\n{IN}### Instruction:\n{IN}{{instruction}}\n{IN}\n{IN}### Response:\n{IN}",
    ),
    # their commonsense_evaluate.py, which differs by white space from what they train on
    "llm-adapters-eval": (
        f"{_WITH} {_ASK}\n\n{IN}### Instruction:\n{IN}{{instruction}}\n\n{IN}### Input:"
        f"\n{IN}{{input}}\n\n{IN}### Response:\n{IN}",
        f"{_TASK}. {_ASK} \n\n{IN}### Instruction:\n{IN}{{instruction}}\n\n{IN}### Response:\n{IN}",
    ),
    "alpaca": (
        f"{_WITH} {_ASK}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n",
        f"{_TASK}. {_ASK}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
    ),
    "plain": ("{instruction}\n{input}\n", "{instruction}\n"),
}
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

Segments = list[tuple[str, bool]]  # pieces of a text, and whether each is an answer


class RecordError(SystemExit):
    """A record that cannot be used; the message names file, record and key."""


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of one file; where: "FILE, record 3" or "FILE:12" (a line), for messages."""
    if not path.exists():
        raise RecordError(f"{path}: no such file")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
            yield f"{path}, row {number}", row
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # with or without the mark that Windows writes in front
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            yield from _listed(path, file) if start == "[" else _lines(path, file)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise RecordError(f"{path}: is not UTF-8 text, or not what its suffix says ({error})") from None


def _listed(path: Path, file) -> Iterator[tuple[str, dict]]:
    try:
        records = json.load(file)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}: not a valid JSON list ({error})") from None
    for number, record in enumerate(records, 1):
        yield _object(f"{path}, record {number}", record)


def _lines(path: Path, file) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}:{number}: not one JSON object a line, nor a JSON list ({error})") from None
            yield _object(f"{path}:{number}", record)


def _object(where: str, record: object) -> tuple[str, dict]:
    if not isinstance(record, dict):
        raise RecordError(f"{where}: is {type(record).__name__}, not an object with keys such as 'instruction'")
    return where, record


def text_of(where: str, record: dict, key: str, default: str | None = None, blank: bool = True) -> str:
    """A field that must be text. default: for a missing one (else an error); blank: whether "" will do."""
    value = record.get(key, default)
    if value is None and key in record:
        raise RecordError(f"{where}: {key!r} is null, not text")
    if value is None:
        raise RecordError(f"{where}: has no key {key!r}; its keys are {sorted(record)}")
    if not isinstance(value, str):
        raise RecordError(f"{where}: {key!r} is {type(value).__name__}, not text")
    if not blank and not value.strip():
        raise RecordError(f"{where}: {key!r} is empty")
    return value


def prompt_of(where: str, record: dict, template: str) -> str:
    """What comes before the answer of an instruction record; template: a name in TEMPLATES."""
    given = text_of(where, record, "input", default="") if record.get("input") is not None else ""
    instruction = text_of(where, record, "instruction", blank=False)
    with_input, alone = TEMPLATES[template]
    # replace, not format: an instruction may hold braces; the input goes in first, so that the text of neither is read
    head, tail = (with_input if given else alone).split("{instruction}")
    return head + instruction + tail.replace("{input}", given)


def segments_of(where: str, record: dict, template: str, render: Callable | None) -> Segments:
    """The text of a record in pieces.

    template: for instruction records. render: `tokenizer.apply_chat_template`, None if the tokenizer has no template.
    """
    if "messages" in record:
        return _chat(where, record["messages"], render)
    if "instruction" in record:
        return [(prompt_of(where, record, template), False), (text_of(where, record, "output", blank=False), True)]
    if "prompt" in record:
        return [(text_of(where, record, "prompt"), False), (text_of(where, record, "completion", blank=False), True)]
    raise RecordError(
        f"{where}: has none of the keys 'instruction' (with 'output'), 'prompt' (with 'completion') and 'messages'; "
        f"its keys are {sorted(record)}"
    )


def _chat(where: str, messages: object, render: Callable | None) -> Segments:
    """Turns of the assistant are answers; each begins where the template, asked for an answer, ends."""
    if render is None:
        raise RecordError(
            f"{where}: 'messages' need a chat template and the tokenizer has none; give --chat-template FILE (Jinja)"
        )
    if not isinstance(messages, list) or not messages:
        raise RecordError(f"{where}: 'messages' must be a list of {{'role', 'content'}} that is not empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise RecordError(f"{where}, message {number}: is {type(message).__name__}, not an object")
        for key in ("role", "content"):
            text_of(f"{where}, message {number}", message, key)
    segments, done = [], ""

    def add(text: str, answer: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise RecordError(
                f"{where}: the chat template rewrites earlier turns when later ones come, so the tokens of an answer "
                "cannot be told; give a template that only appends (--chat-template FILE)"
            )
        segments.append((text[len(done) :], answer))
        done = text

    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            add(_rendered(where, render, messages[:number], True), False)
            add(_rendered(where, render, messages[: number + 1], False), True)
    if not segments:
        raise RecordError(f"{where}: 'messages' has no message whose role is 'assistant': nothing to train on")
    return segments


def _rendered(where: str, render: Callable, messages: list, ask: bool) -> str:
    try:
        return render(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # whatever the template raises (jinja2's own classes, and what it calls)
        raise RecordError(f"{where}: the chat template refuses these messages: {error}") from None
