"""Runs the settings of `mmtok quality` on the pocket tasks: asks a server, and writes rows and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import openai
import torch

from mmtok_bench.client import Answer, MeasurementError, ask, image_url, in_parallel
from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.pocket.questions import AskedScene, fingerprint, make_scenes, picture_of
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.quality.plan import (
    UNPRUNED,
    WITH_AGENT,
    QualityPlan,
    ScoredAnswer,
    Setting,
    answers_beside,
    append_answers,
    method_by_input,
    read_answers,
    replace_answers,
    split_method,
)
from mmtok_bench.quality.rows import ALL_SEEDS, POCKET, rows_of
from mmtok_bench.quality.scoring import max_words
from mmtok_bench.results import ResultRow, drop_unfinished_line
from mmtok_bench.run import Run

__all__ = ["NotPrunedError", "Sweep"]


class NotPrunedError(MeasurementError):
    """The server read as many prompt tokens at a budget as without one."""


class Sweep:
    """One run of a plan; a setting's rows and answers are written when the setting is finished.

    Args:
        plan: The settings and questions.
        run: The run that stores the rows. Settings whose answers are in the file beside its rows are not asked again.
        model: The model's name in rows.
        device: The server's device.
        picture_px: Side of the pictures that are sent.
    """

    def __init__(
        self,
        plan: QualityPlan,
        run: Run,
        model: str,
        *,
        device: torch.device = torch.device("cpu"),
        picture_px: int = SCENE_PX,
    ) -> None:
        self.plan = plan
        self._run = run
        self._model = model
        self._device = device
        self._picture_px = picture_px
        self._scenes: dict[int, list[AskedScene]] = {}
        self._urls: dict[tuple[int, int], str] = {}
        self._answers: dict[Setting, list[ScoredAnswer]] = {}

    def prepare(self) -> list[str]:
        """Makes the questions and pictures, and reads the answers of an earlier run.

        Returns:
            A sentence on each incomplete line or setting of the earlier run, which is dropped.

        Raises:
            ValueError: The earlier run's rows are of another model or other seeds, or its answers to other questions.
        """
        for seed in self.plan.seeds:
            self._scenes[seed] = make_scenes(seed, self.plan.num_questions, self.plan.kinds)
            for asked in self._scenes[seed]:
                self._urls[seed, asked.index] = image_url(picture_of(asked.scene, self._picture_px))
        self._check_rows()
        beside = answers_beside(self._run.path)
        notes = []
        if beside.exists() and drop_unfinished_line(beside):
            notes.append(f"the last line of {beside} was cut off and is dropped")
        self._answers = read_answers(beside)
        for setting, answers in self._answers.items():
            expected = fingerprint(self._scenes.get(setting.seed, []))
            if answers[0].question_set != expected:
                raise ValueError(
                    f"{beside} holds answers to other questions (set {answers[0].question_set}, here {expected}): "
                    "go on with the same seeds, kinds, questions, NumPy and Pillow, or start anew"
                )
        return notes + self._drop_unfinished_settings()

    @property
    def num_done(self) -> int:
        """Requests of this plan that were answered in an earlier run."""
        return sum(len(self._answers.get(setting, ())) for setting in self.plan.settings())

    def ask_all(
        self,
        client: openai.OpenAI,
        *,
        num_at_once: int,
        max_tokens: int | None = None,
        agent_client: openai.OpenAI | None = None,
        check_agent: Callable[[], None] = lambda: None,
    ) -> None:
        """Asks the questions of all settings that have no answers yet.

        Args:
            client: The server's client.
            num_at_once: Number of concurrent requests.
            max_tokens: Length of an answer; None for `max_words` of the question.
            agent_client: Client of the server with an agent, for the method `WITH_AGENT`.
            check_agent: Called before the answers of a setting of `WITH_AGENT` are written; raises an error if the
                agent missed a question.

        Raises:
            ValueError: The plan has `WITH_AGENT`, and there is no such server.
            RequestError: A request failed; settings that were finished before it are kept.
            NotPrunedError: The server does not prune.
        """
        if WITH_AGENT in self.plan.methods and agent_client is None:
            raise ValueError(f"{WITH_AGENT} is asked of a server with --mmtok-agent-url, and there is none")
        for setting in self.plan.settings():
            if setting not in self._answers:
                self._run.step(f"{setting.method} at {setting.budget}, seed {setting.seed}")
                of_agent = agent_client if setting.method == WITH_AGENT else None
                answers = self._ask(of_agent or client, setting, num_at_once, max_tokens)
                self._check_pruned(setting, answers)
                if of_agent is not None:
                    check_agent()
                append_answers(answers_beside(self._run.path), answers)
                self._answers[setting] = answers
            self._write([setting], setting.seed)
            if setting.seed == self.plan.seeds[-1] and len(self.plan.seeds) > 1:
                self._write([replace(setting, seed=seed) for seed in self.plan.seeds], ALL_SEEDS)

    def rows(self) -> list[ResultRow]:
        """Returns the rows of all finished methods and budgets, over all seeds of the plan."""
        pooled = ALL_SEEDS if len(self.plan.seeds) > 1 else str(self.plan.seeds[0])
        pairs = self.plan.pairs()
        return [
            row
            for row in self._run.rows
            if row.case["seed"] == pooled and (row.case["method"], row.case["budget"]) in pairs
        ]

    def _check_rows(self) -> None:
        pooled = fingerprint([asked for seed in self.plan.seeds for asked in self._scenes[seed]])
        for row in self._run.rows:
            found = row.case.get("task", row.bench), row.case.get("model", "no model")
            if found != (POCKET, self._model):
                raise ValueError(
                    f"{self._run.path} holds rows of {found[0]} tasks on {found[1]}, here are {POCKET} tasks on "
                    f"{self._model}: continue with the same model, or start a new file"
                )
            # Rows of all seeds together are not written again.
            if row.case["seed"] == ALL_SEEDS and row.case["question_set"] != pooled:
                seeds = ", ".join(map(str, self.plan.seeds))
                raise ValueError(
                    f"{self._run.path} holds scores over other seeds or questions than those of {seeds}: continue with "
                    "the same --seeds in the same order, or start a new file"
                )

    def _drop_unfinished_settings(self) -> list[str]:
        num_questions = {seed: sum(len(asked.questions) for asked in self._scenes[seed]) for seed in self._scenes}
        unfinished = [setting for setting, found in self._answers.items() if len(found) != num_questions[setting.seed]]
        for setting in unfinished:
            del self._answers[setting]
        if unfinished:
            kept = (answer for answers in self._answers.values() for answer in answers)
            replace_answers(answers_beside(self._run.path), kept)
        return [
            f"not all answers of {setting.method} at {setting.budget}, seed {setting.seed}, were written: it is asked "
            "again"
            for setting in unfinished
        ]

    def _ask(
        self, client: openai.OpenAI, setting: Setting, num_at_once: int, max_tokens: int | None
    ) -> list[ScoredAnswer]:
        fields = {"mm_processor_kwargs": _fields(setting)}
        scenes = self._scenes[setting.seed]
        places = [(asked, number) for asked in scenes for number in range(len(asked.questions))]

        def ask_at(place: tuple[AskedScene, int]) -> Answer:
            asked, number = place
            question = asked.questions[number]
            length = max_tokens or max_words(question)
            url = self._urls[setting.seed, asked.index]
            said = ask(
                client, url, question.text, max_tokens=length, ignore_eos=False, with_account=True, fields=fields
            )
            self._run.advance()
            return said

        started_s = time.perf_counter()
        answers = in_parallel(min(num_at_once, len(places)), ask_at, places)
        cell_s = round(time.perf_counter() - started_s, 2)
        question_set = fingerprint(scenes)
        scored = []
        for (asked, number), said in zip(places, answers, strict=True):
            # Each request has one image.
            image: Mapping[str, Any] = said.account["images"][0] if said.account else {}
            scored.append(
                ScoredAnswer.to_question(
                    *(setting, asked, number, said.text),
                    num_prompt_tokens=said.num_prompt_tokens,
                    num_image_tokens=said.num_image_tokens,
                    latency_ms=round(said.latency_ms, 1),
                    cell_s=cell_s,
                    question_set=question_set,
                    coverage=image.get("coverage"),
                    coverage_bound=image.get("coverage_bound"),
                )
            )
        return scored

    def _check_pruned(self, setting: Setting, answers: Sequence[ScoredAnswer]) -> None:
        unpruned = self._answers.get(Setting(UNPRUNED, "all", setting.seed))
        if setting.method == UNPRUNED or unpruned is None:
            return
        for pruned, full in zip(answers, unpruned, strict=True):
            if pruned.num_prompt_tokens >= full.num_prompt_tokens:
                raise NotPrunedError(
                    f"with {setting.method} at {setting.budget}, {pruned.question!r} took as many prompt tokens as "
                    "unpruned: is the server started with --mmtok-budget, and without --mmtok-min-tokens-in?"
                )

    def _write(self, settings: Sequence[Setting], seed: int | str) -> None:
        """Writes one row for each kind, except those that an earlier run wrote."""
        written = {"method": settings[0].method, "budget": settings[0].budget, "seed": str(seed)}
        if all(self._run.has(**written, kind=kind) for kind in self.plan.kinds):
            return
        answers = [answer for setting in settings for answer in self._answers[setting]]
        unpruned = [
            answer for setting in settings for answer in self._answers.get(Setting(UNPRUNED, "all", setting.seed), ())
        ]
        by_input = [
            answer
            for setting in settings
            if (method := method_by_input(setting.method)) is not None
            for answer in self._answers.get(replace(setting, method=method), ())
        ]
        question_set = fingerprint([asked for setting in settings for asked in self._scenes[setting.seed]])
        for row in rows_of(
            *(answers, unpruned, by_input), model=self._model, seed=seed, question_set=question_set, device=self._device
        ):
            if not self._run.has(**written, kind=row.case["kind"]):
                self._run.add(row)


def _fields(setting: Setting) -> dict[str, str | int | float]:
    fields = MixedBudget.parse(setting.budget).fields
    if setting.method == UNPRUNED:
        return fields
    method, keys = split_method("mmtok" if setting.method == WITH_AGENT else setting.method)
    # Without this field, the server uses the value of its flag.
    of_keys = {"mmtok_keys": keys} if keys == "output" else {}
    return {**fields, "mmtok_method": method, **of_keys, "mmtok_seed": setting.seed}
