"""Measures one model: servers up, answers checked, cells in turns, a row as soon as a cell is done."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from mmtok_bench.chat import ask
from mmtok_bench.results import ResultRow
from mmtok_bench.serve.answers import CheckedAnswer, checked_answers, first_difference
from mmtok_bench.serve.load import (
    LoadError,
    load_command,
    photograph_url,
    read_load,
    run_load,
    write_chats,
)
from mmtok_bench.serve.plan import OFF, Cell, Method, Side, Turn
from mmtok_bench.serve.presets import ServedModel, Size, Sweep
from mmtok_bench.serve.questions import QUESTIONS
from mmtok_bench.serve.rows import Sample, serve_row
from mmtok_bench.serve.server_counts import PeakMemory, read_counts, stage_metrics
from mmtok_bench.serve.servers import ServerPool
from mmtok_bench.server import ServerError, SglangServer

__all__ = ["ModelRun", "chats_file", "seeds_of"]

_FAILURES = (ServerError, LoadError, openai.OpenAIError, http.client.HTTPException, OSError, ValueError)


def seeds_of(sweep: Sweep, turn: Turn, cell: Cell) -> list[str]:
    """Returns the seeds of a cell's photographs: others in every round and workload, the same for all sides."""
    part = f"{'x'.join(map(str, cell.image_px))} round {turn.round_idx} at {cell.concurrency}"
    return [f"{part} {number}" for number in range(sweep.requests_of(cell.concurrency))]


def chats_file(folder: Path, turn: Turn, cell: Cell) -> Path:
    """Returns where the chats of a cell are: one file for all sides that are sent the same images."""
    size, sent = ("x".join(map(str, each)) for each in (cell.image_px, cell.sent_px))
    stem = f"{cell.side.prefix_cache}-{size}-as-{sent}-at-{cell.concurrency}-round-{turn.round_idx}"
    return folder / "chats" / f"{stem}.jsonl"


class ModelRun:
    """One model with the prefix cache on or off.

    Args:
        sweep: What is measured.
        model: Of which model.
        model_path: Its folder.
        folder: Where chats and the load generator's output go.
        pool: Its servers.
        on_row: Called with each row as soon as all its rounds are measured.
        on_failure: Called with what went wrong; measuring goes on with what is left.
        on_step: Called with what is done next.
        on_done: Called when a cell has been measured in one round, or cannot be.
    """

    def __init__(
        self,
        sweep: Sweep,
        model: ServedModel,
        model_path: Path,
        folder: Path,
        pool: ServerPool,
        *,
        on_row: Callable[[ResultRow], None],
        on_failure: Callable[[str], None],
        on_step: Callable[[str], None],
        on_done: Callable[[], None],
    ) -> None:
        self._sweep = sweep
        self._model = model
        self._model_path = model_path
        self._folder = folder
        self._pool = pool
        self._on_row = on_row
        self._on_failure = on_failure
        self._on_step = on_step
        self._on_done = on_done
        self._samples: dict[Cell, list[Sample]] = {}
        self._tokens: dict[Size, int] = {}
        self._warm: dict[Side, tuple[SglangServer, dict[tuple[Size, Method], int]]] = {}

    def run(self, sides: Sequence[Side], turns: Sequence[Turn]) -> bool:
        """Returns whether answers at budget `all` equal those of the server without the plugin; only then it measures.

        Args:
            sides: The servers; the first is the one without the plugin, the second the one at budget `all`.
            turns: In which order cells are measured.
        """
        self._pool.start_all(sides)
        try:
            difference = self._check(sides[0], sides[1], turns)
        except _FAILURES as error:
            self._on_failure(f"{self._model.name}: no comparison of answers, nothing is measured: {error}")
            return False
        if difference is not None:
            self._on_failure(f"{self._model.name}: answers differ, nothing is measured: {difference}")
            return False
        try:
            for turn in turns:
                self._measure_turn(turn)
        finally:
            # After Ctrl-C, or with a server that died between rounds: what was measured is written.
            for cell in list(self._samples):
                self._write(cell)
        return True

    def _check(self, off: Side, at_all: Side, turns: Sequence[Turn]) -> str | None:
        sizes_px = list(dict.fromkeys(cell.image_px for turn in turns for cell in turn.cells))
        answers: dict[str, list[CheckedAnswer]] = {}
        # The server without the plugin second: where one runs at a time, it is the first that is measured.
        for side in (at_all, off):
            self._on_step(f"{self._model.name}: starting and checking the server at budget {side.budget}")
            answers[side.budget] = checked_answers(self._pool.get(side), sizes_px)
        counts = (answer.num_image_tokens for answer in answers[OFF])
        self._tokens = dict(zip(sizes_px, counts, strict=True))
        return first_difference(answers[OFF], answers[at_all.budget])

    def _measure_turn(self, turn: Turn) -> None:
        for cell in turn.cells:
            self._on_step(_describe(self._model, cell))
            try:
                if turn.side not in self._pool.dead:
                    self._measure(turn, cell)
            except _FAILURES as error:
                self._report(turn.side, cell, error)
            self._on_done()

    def _measure(self, turn: Turn, cell: Cell) -> None:
        server = self._pool.get(turn.side)
        kept = self._warm_up(server, turn.side, cell)
        sample = self._sample(server, turn, cell, kept)
        samples = self._samples.setdefault(cell, [])
        samples.append(sample)
        if sample.load.num_failed:
            failed = f"{sample.load.num_failed} requests failed, the first with: {sample.load.first_error}"
            self._on_failure(f"{_describe(self._model, cell)}: {failed}")
        if len(samples) == self._sweep.rounds:
            self._write(cell)

    def _report(self, side: Side, cell: Cell, error: Exception) -> None:
        try:
            # A server that died is reported with its log's end, whatever its clients saw of it.
            self._pool.get(side)
        except ServerError as death:
            self._on_failure(f"{self._model.name}: no more cells of budget {side.budget}: {death}")
        else:
            self._on_failure(f"{_describe(self._model, cell)}: {type(error).__name__}: {error}")

    def _write(self, cell: Cell) -> None:
        self._on_row(serve_row(self._sweep, self._model, cell, self._samples.pop(cell)))

    def _warm_up(self, server: SglangServer, side: Side, cell: Cell) -> int:
        """Returns the tokens that the model reads of an image of this size; the first time, the server is warmed up."""
        known = self._warm.get(side)
        if known is None or known[0] is not server:
            known = self._warm[side] = (server, {})
        counts = known[1]
        warmed_up = cell.sent_px, cell.method
        if warmed_up not in counts:
            # On a CPU a request takes seconds, and there is nothing to compile or tune for more of them.
            num_requests = 1 if self._sweep.device == "cpu" else max(self._sweep.concurrencies)
            seeds = [f"warm-up {cell.sent_px} {number}" for number in range(num_requests)]
            counts[warmed_up] = self._ask_all(server, seeds, cell, cell.sent_px, num_requests)
        return counts[warmed_up]

    def _ask_all(self, server: SglangServer, seeds: Sequence[str], cell: Cell, image_px: Size, at_once: int) -> int:
        client = server.client()

        def ask_about(seed: str) -> int:
            url = photograph_url(image_px, cell.sent_px, seed)
            return ask(client, url, QUESTIONS[0], max_tokens=2, fields=cell.request_fields).num_image_tokens

        with ThreadPoolExecutor(at_once) as threads:
            return max(threads.map(ask_about, seeds))

    def _sample(self, server: SglangServer, turn: Turn, cell: Cell, kept: int) -> Sample:
        num_requests = self._sweep.requests_of(cell.concurrency)
        chats = chats_file(self._folder, turn, cell)
        if cell.image_kind == "photograph" and not chats.exists():
            # With the prefix cache on, servers are asked the first question about every image beforehand.
            questions = QUESTIONS if cell.side.prefix_cache == "off" else QUESTIONS[1:]
            write_chats(chats, cell.image_px, cell.sent_px, seeds_of(self._sweep, turn, cell), questions)
        if cell.side.prefix_cache == "on":
            self._ask_all(server, seeds_of(self._sweep, turn, cell), cell, cell.image_px, cell.concurrency)
        stem = f"{cell.method}-{cell.budget.replace('%', 'pct')}-{cell.image_kind}-{chats.stem}"
        output, log = self._folder / "load" / f"{stem}.jsonl", self._folder / "load" / f"{stem}.log"
        command = load_command(
            cell,
            server.url,
            str(self._model_path),
            num_requests=num_requests,
            output_tokens=self._sweep.output_tokens,
            seed=turn.round_idx * 1000 + cell.concurrency,
            chats=chats,
            output=output,
        )
        before = read_counts(server)
        with PeakMemory(server.process_id, self._sweep.device) as memory:
            run_load(command, log, is_server_alive=server.is_alive)
        load = read_load(output)
        return Sample(
            load=load,
            stages=stage_metrics(before, read_counts(server), num_requests),
            peak_memory_bytes=memory.peak_bytes,
            max_total_tokens=int(server.server_info()["max_total_num_tokens"]),
            image_tokens_in=self._tokens[cell.image_px],
            image_tokens_kept=kept,
        )


def _describe(model: ServedModel, cell: Cell) -> str:
    size, sent = ("x".join(map(str, each)) for each in (cell.image_px, cell.sent_px))
    sending = ""
    if cell.method == "downsample":
        sending = " made smaller" if cell.request_fields else f" sent as {sent}"
    cache = f", prefix cache {cell.side.prefix_cache}"
    return (
        f"{model.name}: budget {cell.side.budget}, {cell.image_kind} {size}{sending}, "
        f"concurrency {cell.concurrency}{cache}"
    )
