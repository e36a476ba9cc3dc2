"""Measures one model: starts servers, checks answers, measures cases in turns, writes a row when a case is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from mmtok_bench.client import Answer, RequestError, ask, in_parallel
from mmtok_bench.load_images import load_image_url
from mmtok_bench.run import Run
from mmtok_bench.serve.load import LoadError, LoadGenerator, load_arguments, read_load, write_chats
from mmtok_bench.serve.plan import OFF, LoadCase, Method, Side, Turn, are_side_by_side
from mmtok_bench.serve.presets import QUESTIONS, ServedModel, ServePlan, Size
from mmtok_bench.serve.rows import Sample, serve_row
from mmtok_bench.server import ServerError, ServerPool, SglangServer
from mmtok_bench.server_metrics import PeakMemory, read_counts, stage_metrics

__all__ = ["ModelRun", "chats_of", "first_difference", "load_of"]

_FAILURES = (ServerError, RequestError, LoadError, OSError)
_CHECKED_TOKENS = 8
# In half precision, logprobs may differ in their last bits if requests are batched differently.
_LOGPROB_TOLERANCE = 1e-2


@dataclass
class ModelRun:
    """Measures one model with the prefix cache on or off.

    Args:
        plan: What is measured.
        model: The model that is measured.
        model_path: Its folder.
        pool: Its servers.
        generator: Sends the requests.
        run: Takes rows and failures; after a failure, measuring continues with the next case.
    """

    plan: ServePlan
    model: ServedModel
    model_path: Path
    pool: ServerPool[Side]
    generator: LoadGenerator
    run: Run
    _samples: dict[LoadCase, dict[int, Sample]] = field(default_factory=dict, init=False)
    _written: set[LoadCase] = field(default_factory=set, init=False)
    _tokens: dict[Size, int] = field(default_factory=dict, init=False)
    _warm: dict[tuple[SglangServer, Size, Method, str], int] = field(default_factory=dict, init=False)

    def measure(self, sides: Sequence[Side], turns: Sequence[Turn]) -> None:
        """Measures the cases, if answers at budget `all` equal those of the server without the plugin.

        Args:
            sides: The servers; the first is without the plugin, the second at budget `all`.
            turns: The order in which cases are measured.
        """
        self.pool.start_all(sides)
        try:
            difference = self._check(sides[0], sides[1], turns)
        except _FAILURES as error:
            self.run.fail(f"{self.model.name}: no comparison of answers, nothing is measured: {error}")
            return
        if difference is not None:
            self.run.fail(f"{self.model.name}: answers differ, nothing is measured: {difference}")
            return
        try:
            for turn in turns:
                for case in turn.cases:
                    self._measure(turn, case)
                    self.run.advance()
        finally:
            # After Ctrl-C, or if a server died between rounds, finished rounds are written.
            for case in self._samples:
                self._write(case)

    def _check(self, off: Side, at_all: Side, turns: Sequence[Turn]) -> str | None:
        sizes_px = list(dict.fromkeys(case.image_px for turn in turns for case in turn.cases))
        answers: dict[str, list[Answer]] = {}
        # The server without the plugin is second: if one server runs at a time, it is also measured first.
        for side in (at_all, off):
            self.run.step(f"{self.model.name}: starting and checking the server at budget {side.budget}")
            client = self.pool.get(side).client()
            answers[side.budget] = [
                ask(
                    client,
                    load_image_url("photograph", size_px, size_px, f"check {number}", lossless=self.model.sends_png),
                    QUESTIONS[number % len(QUESTIONS)],
                    max_tokens=_CHECKED_TOKENS,
                    with_logprobs=True,
                )
                for number, size_px in enumerate(sizes_px)
            ]
        counts = (answer.num_image_tokens or 0 for answer in answers[OFF])
        self._tokens = dict(zip(sizes_px, counts, strict=True))
        return first_difference(answers[OFF], answers[at_all.budget])

    def _measure(self, turn: Turn, case: LoadCase) -> None:
        what = _describe(self.model, case)
        self.run.step(what)
        if turn.side in self.pool.dead:
            return
        try:
            server = self.pool.get(turn.side)
            sample = self._sample(server, turn, case, self._warm_up(server, case))
        except _FAILURES as error:
            try:
                # A server that died is reported with the end of its log, not with the client's error.
                self.pool.get(turn.side)
            except ServerError as death:
                self.run.fail(f"{self.model.name}: no more cases of budget {turn.side.budget}: {death}")
            else:
                self.run.fail(f"{what}: {type(error).__name__}: {error}")
            return
        self._samples.setdefault(case, {})[turn.round_idx] = sample
        if sample.load.num_failed:
            self.run.fail(
                f"{what}: {sample.load.num_failed} requests failed, the first with: {sample.load.first_error}"
            )
        # A row contains its ratio to the unpruned server, so that server's row comes first.
        finished = [each for each, of_rounds in self._samples.items() if len(of_rounds) == self.plan.rounds]
        measured = [each for each in finished if each.workload == case.workload]
        if any(each.is_unpruned for each in measured):
            for each in sorted(measured, key=lambda each: not each.is_unpruned):
                self._write(each)

    def _write(self, case: LoadCase) -> None:
        if case in self._written:
            return
        self._written.add(case)
        of_workload = {each: found for each, found in self._samples.items() if each.workload == case.workload}
        # Empty if that server died: there is no ratio then.
        unpruned = next((found for each, found in of_workload.items() if each.is_unpruned), {})
        self.run.add(serve_row(self.plan, self.model, case, of_workload[case], unpruned))

    def _warm_up(self, server: SglangServer, case: LoadCase) -> int:
        """Warms the server up for this image size, once; returns how many tokens the model reads of such an image."""
        key = server, case.sent_px, case.method, case.budget
        if key not in self._warm:
            # On a CPU one request is enough: it takes seconds, and nothing is compiled or tuned for larger batches.
            num_requests = 1 if self.plan.device == "cpu" else max(self.plan.concurrencies)
            seeds = [f"warm-up {case.sent_px} {number}" for number in range(num_requests)]
            self._warm[key] = self._ask_all(server, seeds, case, case.sent_px, num_requests)
        return self._warm[key]

    def _ask_all(self, server: SglangServer, seeds: Sequence[str], case: LoadCase, image_px: Size, at_once: int) -> int:
        client = server.client()

        def ask_about(seed: str) -> int:
            shown = "photograph" if case.image_kind == "random" else case.image_kind
            url = load_image_url(shown, image_px, case.sent_px, seed, lossless=self.model.sends_png)
            return ask(client, url, QUESTIONS[0], max_tokens=2, fields=case.request_fields).num_image_tokens or 0

        return max(in_parallel(at_once, ask_about, seeds))

    def _sample(self, server: SglangServer, turn: Turn, case: LoadCase, kept: int) -> Sample:
        arguments, chats, output = load_of(self.plan, turn, case, server, self.model_path, self.run.folder)
        seeds = _seeds_of(self.plan, turn, case)
        asked = chats_of(self.plan, case, seeds)
        if case.image_kind != "random" and not chats.exists():
            write_chats(chats, case.image_kind, case.image_px, case.sent_px, asked, lossless=self.model.sends_png)
        if case.side.prefix_cache == "on" and case.questions == 1:
            self._ask_all(server, seeds, case, case.image_px, case.concurrency)
        before = read_counts(server)
        on_cpu = self.plan.device == "cpu"
        with PeakMemory(server.process_id, on_cpu=on_cpu) as memory:
            self.generator.run(arguments, output.with_suffix(".log"), is_server_alive=server.is_alive)
        load = read_load(output)
        firsts = {seed: number for number, (seed, _) in reversed(list(enumerate(asked)))}
        return Sample(
            load=load,
            stages=stage_metrics(before, read_counts(server), len(asked)),
            is_later=[firsts[asked[number][0]] < number for number in load.answered] if case.questions > 1 else [],
            # The memory of a GPU is shared by all servers on it.
            peak_memory_bytes=memory.peak_bytes if on_cpu or not are_side_by_side(self.plan, self.model) else None,
            max_total_tokens=int(server.server_info()["max_total_num_tokens"]),
            image_tokens_in=self._tokens[case.image_px],
            image_tokens_kept=kept,
        )


def load_of(
    plan: ServePlan, turn: Turn, case: LoadCase, server: SglangServer, model_path: Path, folder: Path
) -> tuple[list[str], Path, Path]:
    """Returns a case's arguments for the load generator, its file of chats, and its file of results.

    All sides that get the same images share one file of chats. Cases whose server gets requests of other cases, too,
    have images of their own, since the server caches features.
    """
    size, sent = ("x".join(map(str, each)) for each in (case.image_px, case.sent_px))
    images = (
        f"{case.image_kind}-{size}-as-{sent}-prefix-cache-{case.side.prefix_cache}-"
        f"at-{case.concurrency}-{case.questions}-each-round-{turn.round_idx}"
    )
    name = f"{case.method}-{case.budget.replace('%', 'pct')}-{images}"
    seed = turn.round_idx * 1000 + case.concurrency
    if case.has_own_images:
        images, seed = name, crc32(name.encode())
    chats = folder / "chats" / f"{images}.jsonl"
    output = folder / "load" / f"{name}.jsonl"
    arguments = load_arguments(
        case,
        server.url,
        str(model_path),
        num_requests=plan.images_of(case.concurrency, case.questions) * case.questions,
        output_tokens=plan.output_tokens,
        seed=seed,
        chats=chats,
        output=output,
    )
    return arguments, chats, output


def first_difference(without: Sequence[Answer], with_all: Sequence[Answer]) -> str | None:
    """Returns the first difference between two servers' answers, in words; None if there is none."""
    for number, (left, right) in enumerate(zip(without, with_all, strict=True)):
        if left.text != right.text:
            return f"answer {number}: {left.text!r} without the plugin, {right.text!r} at budget all"
        if left.num_image_tokens != right.num_image_tokens:
            return f"answer {number}: {left.num_image_tokens} image tokens without, {right.num_image_tokens} at all"
        if len(left.logprobs) != len(right.logprobs):
            return (
                f"answer {number}: {len(left.logprobs)} tokens without the plugin, {len(right.logprobs)} at budget all"
            )
        furthest = max(abs(one - other) for one, other in zip(left.logprobs, right.logprobs, strict=True))
        if furthest > _LOGPROB_TOLERANCE:
            return f"answer {number}: its logprobs differ by up to {furthest:.2g}, allowed are {_LOGPROB_TOLERANCE}"
    return None


def chats_of(plan: ServePlan, case: LoadCase, seeds: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the photograph's seed and the question of each request of a case, in order.

    Questions about one image are separated by questions about the other images in turn, so that nearly always the
    previous question is answered before the next one is sent.
    """
    if case.questions == 1:
        # With the prefix cache on, the first question about every image is asked before the measurement.
        questions = QUESTIONS if case.side.prefix_cache == "off" else QUESTIONS[1:]
        return [(seed, questions[number % len(questions)]) for number, seed in enumerate(seeds)]
    in_turn = plan.images_in_turn or case.concurrency
    return [
        (seed, question)
        for first in range(0, len(seeds), in_turn)
        for question in QUESTIONS[: case.questions]
        for seed in seeds[first : first + in_turn]
    ]


def _seeds_of(plan: ServePlan, turn: Turn, case: LoadCase) -> list[str]:
    """Returns the seeds of a case's photographs, which differ by round and workload.

    They are the same for all sides, except for cases with images of their own.
    """
    size = "x".join(map(str, case.image_px))
    part = f"{size} round {turn.round_idx} at {case.concurrency}, {case.questions} each"
    if case.has_own_images:
        part += f", {case.method} {case.budget}"
    return [f"{part} {number}" for number in range(plan.images_of(case.concurrency, case.questions))]


def _describe(model: ServedModel, case: LoadCase) -> str:
    size, sent = ("x".join(map(str, each)) for each in (case.image_px, case.sent_px))
    sending = ""
    if case.method == "downsample":
        sending = " made smaller" if case.request_fields else f" sent as {sent}"
    budget = case.side.budget if case.method in ("none", "downsample") else case.budget
    by = f" by {case.method}" if case.is_of_another_method else ""
    return (
        f"{model.name}: budget {budget}{by}, {case.image_kind} {size}{sending}, "
        f"concurrency {case.concurrency}, {'' if case.questions == 1 else f'{case.questions} questions an image, '}"
        f"prefix cache {case.side.prefix_cache}"
    )
