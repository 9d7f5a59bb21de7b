"""Answers of a model: the likeliest of the options, or what it writes; batches are dealt to processes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from launch.commonsense import RESPONSE, Question, extract_answer
from launch.examples import Example, collate, encode
from launch.losses import token_losses
from launch.processes import Processes


@dataclass
class Scored:
    """Results of one task: the option chosen for each question ("" if none), and why (scores, or the text written)."""

    chosen: list[str]
    detail: list


@dataclass(frozen=True)
class Judge:
    """A model that is asked. batch: rows at once. context: most tokens it reads; longer prompts lose the front."""

    model: nn.Module
    tokenizer: object
    processes: Processes
    batch: int
    context: int
    pad: int

    def likelihood(self, questions: Sequence[Question]) -> Scored:
        """The option for which log p("the correct answer is OPTION" | prompt), summed over tokens, is highest.

        Raises:
            SystemExit: a score is no number, so that no option is the likeliest.
        """
        rows = [(n, option) for n, question in enumerate(questions) for option in question.options]
        texts = [([(questions[n].prompt, False), (RESPONSE + option, True)], False) for n, option in rows]
        examples = [_last(e, self.context) for e, _ in encode(texts, self.tokenizer, 1 << 30, False)]
        scores = self._dealt([len(e.ids) for e in examples], lambda some: self._scores([examples[i] for i in some]))
        if bad := sum(map(math.isnan, scores)):  # max() would take the first option, and the table look like a result
            raise SystemExit(
                f"the model's likelihood of {bad} of {len(scores)} answers is nan: its training has diverged, or it "
                "overflows in this --dtype (try --dtype fp32)"
            )
        table: list[dict[str, float]] = [{} for _ in questions]
        for (number, option), score in zip(rows, scores, strict=True):
            table[number][option] = score
        return Scored([max(scored, key=scored.get) for scored in table], table)

    def generation(self, task: str, questions: Sequence[Question], beams: int, new_tokens: int) -> Scored:
        """The first option in what the model writes: beam search, at most `new_tokens`.

        The prompt is tokenised as in training, with an answer behind it, so that the space before the answer's first
        word is where the model has learnt it (LLM-Adapters' script puts it in the prompt).
        """
        texts = [([(question.prompt, False), (RESPONSE, True)], False) for question in questions]
        encoded = encode(texts, self.tokenizer, 1 << 30, False)
        room = self.context - new_tokens
        prompts = [e.ids[: int((e.labels >= 0).argmax())][-room:] for e, _ in encoded]
        lengths = [len(ids) for ids in prompts]
        written = self._dealt(lengths, lambda some: self._write([prompts[i] for i in some], beams, new_tokens))
        return Scored([extract_answer(task, text) for text in written], written)

    def _dealt(self, lengths: Sequence[int], work: Callable[[list[int]], list]) -> list:
        """`work` of every item, in order. Batches are of similar length, the same for any number of processes."""
        order = np.argsort([-n for n in lengths], kind="stable").tolist()
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        own = {
            i: result
            for b in batches[self.processes.rank :: self.processes.world]
            for i, result in zip(b, work(b), strict=True)
        }
        parts = [own]
        if self.processes.world > 1:
            parts = [None] * self.processes.world
            dist.all_gather_object(parts, own)
        whole = {i: result for part in parts for i, result in part.items()}
        return [whole[i] for i in range(len(lengths))]

    @torch.no_grad()
    def _scores(self, examples: list[Example]) -> list[float]:
        batch = collate([[e] for e in examples], self.pad, packed=False)
        batch = {name: value.to(self.processes.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        return (-token_losses(self.model(**batch).logits, labels).double().sum(dim=1)).tolist()

    @torch.no_grad()
    def _write(self, prompts: list[np.ndarray], beams: int, new_tokens: int) -> list[str]:
        width = max(len(ids) for ids in prompts)
        ids = np.full((len(prompts), width), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: what is written follows the prompt
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        given = {name: value.to(self.processes.device) for name, value in given.items()}
        found = self.model.generate(
            **given, num_beams=beams, do_sample=False, max_new_tokens=new_tokens, pad_token_id=self.pad
        )
        return self.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)


def _last(example: Example, context: int) -> Example:
    """Its last `context` tokens."""
    return Example(example.ids[-context:], example.labels[-context:])


def accuracy(questions: Sequence[Question], scored: Scored) -> dict[str, float]:
    """Of one task: questions, accuracy, its standard error, that of guessing, and how many got no answer."""
    count = len(questions)
    right = sum(q.answer == chosen for q, chosen in zip(questions, scored.chosen, strict=True)) / count
    return {
        "questions": count,
        "accuracy": right,
        "stderr": math.sqrt(right * (1 - right) / max(1, count - 1)),
        "chance": sum(1 / len(q.options) for q in questions) / count,
        "unanswered": sum(not chosen for chosen in scored.chosen),
    }
