"""The eight commonsense tasks in LLM-Adapters' format: a list of {"instruction", "answer", ...} in TASK/test.json.

Answers are words such as "solution2"; an instruction ends in "Answer format: solution1/solution2", and the response a
model was trained on is "the correct answer is solution2".
"""

import re
from dataclasses import dataclass
from pathlib import Path

from launch.records import RecordError, prompt_of, read_records, text_of

_ANSWERS = tuple(f"answer{i}" for i in range(1, 6))
TASKS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": _ANSWERS,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "openbookqa": _ANSWERS,
}
RESPONSE = "the correct answer is "  # what comes before the answer in commonsense_170k.json


@dataclass(frozen=True)
class Question:
    """One record: the prompt as the template makes it, the answers one may give, and the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: str


def load_task(folder: Path, task: str, template: str, limit: int | None) -> list[Question]:
    """Questions of FOLDER/TASK/test.json; limit: only so many.

    Raises:
        RecordError: the file is not there, or a record has not what it needs.
    """
    path = folder / task / "test.json"
    if not path.exists():
        there = sorted(p.parent.name for p in folder.glob("*/test.json"))
        raise RecordError(
            f"--data {folder}: no {task}/test.json in there (found: {', '.join(there) or 'none'}); it is the folder "
            "`dataset` of LLM-Adapters, or one like it"
        )
    records = [question(where, record, task, template) for where, record in read_records(path)][:limit]
    if not records:
        raise RecordError(f"{path}: no records")
    return records


def question(where: str, record: dict, task: str, template: str) -> Question:
    """Check one record. where: for messages."""
    options = options_of(text_of(where, record, "instruction", blank=False), task)
    answer = text_of(where, record, "answer", blank=False).strip()
    if answer not in options:
        raise RecordError(f"{where}: 'answer' is {answer!r}, which is none of {', '.join(options)}")
    return Question(prompt_of(where, record, template), options, answer)


def options_of(instruction: str, task: str) -> tuple[str, ...]:
    """The answers an instruction allows: its "Answer format: a/b/c", else those it mentions, else all of the task."""
    said = re.search(r"answer format:\s*(\S+?)\.?\s*$", instruction, re.IGNORECASE)
    named = tuple(said.group(1).split("/")) if said else ()
    if named and all(option in TASKS[task] for option in named):
        return named
    mentioned = tuple(o for o in TASKS[task] if re.search(rf"\b{o}\b", instruction, re.IGNORECASE))
    return mentioned if len(mentioned) > 1 else TASKS[task]


def extract_answer(task: str, text: str) -> str:
    """The first of the task's answers in what a model wrote, "" if there is none; LLM-Adapters' rule, case included."""
    found = re.search("|".join(TASKS[task]), text)
    return found.group() if found else ""
