"""MT-Bench (Zheng et al., 2023): 80 conversations of two turns, each answer rated 1 to 10 by a judge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from warploom.data.chat import ChatTemplate
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.judge import Judge, make_judge, own_template, rating_of
from warploom.evaluation.multiple_choice import record
from warploom.evaluation.task import Item, Record, Task, TaskFiles, require
from warploom.evaluation.text_model import TextModel
from warploom.generate.distribution import SamplingConfig

# Of the answers, by category; 0 for the others (FastChat's).
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_WITH_REFERENCE = ("math", "reasoning", "coding")
_MAX_NEW_TOKENS = 1024
# Conversations held side by side; an interruption loses the answers of at most so many.
_TOGETHER = 20


class MTBench(Task):
    """turn_1 and turn_2: the ratings; rating: their mean, of the turns that have one. unparsable_as_1: the mean if a
    judgment without a rating counts as the worst one.

    A judgment without a rating is flagged and counted. Without a judge the answers are written and have no scores; the
    same command with a judge then only judges.
    """

    name = "mt_bench"
    version = "1"
    files = {
        "test": ("*mt?bench/question.jsonl*", "*question.jsonl*"),
        "reference": ("*mt?bench/reference_answer/gpt-4.jsonl*", "*reference_answer/*"),
        "prompts": ("*mt?bench/judge_prompts.jsonl*", "*judge_prompts.jsonl*"),
    }
    is_limited_by_group = True

    def items(self, files: TaskFiles, num_shots: int) -> list[Item]:
        if num_shots:
            raise UserError("mt_bench takes no shots; leave shots out")
        references = {}
        for _, row in files.rows(self, "reference"):
            id_, choices = require(row, self, "question_id", "choices")
            references[id_] = choices[0]["turns"]
        prompts = {}
        for _, row in files.rows(self, "prompts"):
            name, system, template = require(row, self, "name", "system_prompt", "prompt_template")
            prompts[name] = {"system": system, "template": template}
        items = []
        for _, row in files.rows(self, "test"):
            id_, category, turns = require(row, self, "question_id", "category", "turns")
            has_reference = category in _WITH_REFERENCE
            if has_reference and id_ not in references:
                raise UserError(f"mt_bench, question {id_}: its category {category} needs a reference answer")
            kind = "single-math-v1" if has_reference else "single-v1"
            values = {
                "turns": turns,
                "reference": references[id_] if has_reference else None,
                "judge_prompts": [prompts[kind], prompts[f"{kind}-multi-turn"]],
            }
            items.append(Item(str(id_), turns[0], values, category))
        return items

    def check(self, config: EvalConfig) -> None:
        make_judge(config)

    def settings(self, config: EvalConfig) -> dict[str, Any]:
        return {"max_new_tokens": config.max_new_tokens or _MAX_NEW_TOKENS, "seed": config.seed}

    def answer(self, model: TextModel, items: Sequence[Item], config: EvalConfig) -> Iterator[Record]:
        template = _template(model, config)
        judge = make_judge(config)
        for start in range(0, len(items), _TOGETHER):
            part = items[start : start + _TOGETHER]
            answers: list[list[str]] = [[] for _ in part]
            flags: list[list[str]] = [[] for _ in part]
            for turn in range(2):
                talks = [conversation(item.values["turns"], said) for item, said in zip(part, answers, strict=True)]
                prompts = [template.encode(model.tokenizer, talk, add_generation_prompt=True).ids for talk in talks]
                for number, (text,), cut in model.complete(
                    prompts,
                    [_sampling(item, config) for item in part],
                    names=[f"{item.id}/{turn}" for item in part],
                    end_id=template.end_id(model.tokenizer),
                ):
                    answers[number].append(text)
                    flags[number] += ["prompt cut"] if cut else []
            for number, item in enumerate(part):
                done = record(item, {}, flags[number], turns=item.values["turns"], answers=answers[number])
                yield self._judged(done, item, judge)

    def finish(self, done: Record, item: Item, config: EvalConfig) -> Record | None:
        """Judge answers that wait for it; None if there is nothing to do."""
        if "judgments" in done or config.judge is None:
            return None
        return self._judged(done, item, make_judge(config))

    def _judged(self, done: Record, item: Item, judge: Judge | None) -> Record:
        if judge is None:
            return done | {"flags": [*done["flags"], "waits for a judge"]}
        judgments = [judge(judge_messages(item.values, done["answers"], turn)) for turn in range(2)]
        ratings = [rating_of(judgment) for judgment in judgments]
        scores = {f"turn_{turn + 1}": rating for turn, rating in enumerate(ratings) if rating is not None}
        if scores:
            scores["rating"] = sum(scores.values()) / len(scores)
        scores["rating_unparsable_as_1"] = sum(1.0 if rating is None else rating for rating in ratings) / 2
        flags = [flag for flag in done["flags"] if flag != "waits for a judge"]
        flags += [f"turn {turn + 1}: unparsable judgment" for turn, rating in enumerate(ratings) if rating is None]
        return done | {
            "scores": scores,
            "flags": flags,
            "judgments": judgments,
            "ratings": ratings,
            "judge": judge.name,
        }


def _sampling(item: Item, config: EvalConfig) -> SamplingConfig:
    return SamplingConfig(
        temperature=TEMPERATURES.get(item.group, 0.0),
        max_new_tokens=config.max_new_tokens or _MAX_NEW_TOKENS,
        seed=config.seed,
    )


def conversation(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """The messages up to the question that is to be answered next."""
    messages = []
    for question, answer in zip(questions, answers, strict=False):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": questions[len(answers)]}]


def judge_messages(values: Mapping[str, Any], answers: Sequence[str], turn: int) -> list[dict[str, str]]:
    """What the judge is told about an answer: the benchmark's own prompt for the first turn, and for the second."""
    prompt, turns, reference = values["judge_prompts"][turn], values["turns"], values["reference"]
    words = (
        {"question": turns[0], "answer": answers[0]}
        if turn == 0
        else {"question_1": turns[0], "question_2": turns[1], "answer_1": answers[0], "answer_2": answers[1]}
    )
    if reference is not None:
        words |= {f"ref_answer_{n + 1}": text for n, text in enumerate(reference)}
    return [
        {"role": "system", "content": prompt["system"]},
        {"role": "user", "content": prompt["template"].format(**words)},
    ]


def _template(model: TextModel, config: EvalConfig) -> ChatTemplate:
    template = model.chat_template or own_template(model.tokenizer)
    if config.chat_template is not None:
        template = ChatTemplate.named(config.chat_template)
    if template is None:
        raise UserError(
            "mt_bench is a conversation and the checkpoint holds no chat template; name one with --chat-template, or "
            "leave mt_bench out"
        )
    return template
