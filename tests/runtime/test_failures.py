from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setproctitle
import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult, MultiModalStaticCache
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from mmtok_sglang import failures as module
from mmtok_sglang.failures import Failures, RankError, failed_on_all_ranks
from tests.runtime.stand_ins import image_item

VOCABULARY = 100


def images(*hashes: int) -> list[Any]:
    """Returns items of 3 tokens each, at 10, 20 and so on."""
    return [image_item((10 * place, 10 * place + 2), hash=each) for place, each in enumerate(hashes, 1)]


def zeros(_item: Any, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, 4)


class Encoder:
    """Gives each item its hash as features; raises at some calls, or for some items."""

    def __init__(self, calls: tuple[int, ...] = (), hashes: tuple[int, ...] = ()) -> None:
        self.calls: list[list[int]] = []
        self._bad = (calls, hashes)

    def __call__(self, items: list[Any]) -> list[Tensor]:
        self.calls.append([item.hash for item in items])
        calls, hashes = self._bad
        if len(self.calls) in calls or any(item.hash in hashes for item in items):
            raise RuntimeError("no memory")
        return [torch.full((3, 4), float(item.hash)) for item in items]


@pytest.fixture(autouse=True)
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(pp_rank=0))


def test_what_works_is_left_alone() -> None:
    failures, encoder = Failures(), Encoder()
    features = failures.guard_features(encoder, images(1, 2), zeros)
    assert [int(each[0, 0]) for each in features] == [1, 2]
    assert encoder.calls == [[1, 2]]


@pytest.mark.parametrize(
    ("encoder", "calls", "given", "marked"),
    [
        (Encoder(calls=(1,)), [[1, 2], [1], [2]], [1, 2], []),
        (Encoder(hashes=(2,)), [[1, 2], [1], [2]], [1, 0], [2]),
        (Encoder(calls=(1, 2)), [[1, 2], [1], [2]], [0, 2], [1]),
        (Encoder(calls=(1, 2, 3)), [[1, 2], [1], [2]], [0, 0], [1, 2]),
    ],
    ids=["once", "one image", "twice", "always"],
)
def test_after_an_error_each_image_is_tried_by_itself(
    encoder: Encoder, calls: list[list[int]], given: list[int], marked: list[int]
) -> None:
    failures = Failures()
    features = failures.guard_features(encoder, images(1, 2), zeros)
    assert [int(each[0, 0]) for each in features] == given
    assert [tuple(each.shape) for each in features] == [(3, 4)] * 2
    assert encoder.calls == calls
    assert [each for each in (1, 2) if failures.is_marked(each)] == marked


def request(*items: Any) -> Any:
    return SimpleNamespace(
        multimodal_inputs=SimpleNamespace(mm_items=list(items)) if items else None,
        skip_radix_cache_insert=False,
        discard_output_reason=None,
        beam_group=None,
    )


def run(failures: Failures, scheduler: Any, reqs: list[Any], spans: list[tuple[int, int]], *marked: int) -> Any:
    batch = SimpleNamespace(
        reqs=reqs, prefix_lens=[first for first, _ in spans], extend_lens=[stop - first for first, stop in spans]
    )

    def original(_scheduler: Any, _batch: Any) -> str:
        for each in marked:
            failures.mark(each, "no memory")
        return "result"

    return failures.run_batch(original, scheduler, batch)


def test_a_marked_images_requests_end_and_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MultiModalStaticCache(1 << 20)
    monkeypatch.setattr(mm_schedule, "embedding_cache", cache)
    one, two = images(1, 2)
    for item in (one, two):
        cache.set(item.hash, EmbeddingResult(embedding=torch.zeros(3, 4)))
    reads, reads_later, decodes, other, text = request(one), request(two, one), request(one), request(two), request()
    scheduler = SimpleNamespace(chunked_req=reads, _pending_chunked_abort_req=None)
    reqs = [reads, reads_later, decodes, other, text]
    failures = Failures()
    assert run(failures, scheduler, reqs, [(5, 12), (13, 30), (40, 41), (0, 30), (0, 9)], 1) == "result"
    ended = [req for req in reqs if req.discard_output_reason is not None]
    assert ended == [reads]
    assert reads.discard_output_reason.to_json() == {
        "type": "abort",
        "message": "MMTok: no memory",
        "status_code": 500,
        "err_type": "InternalServerError",
    }
    assert [req.skip_radix_cache_insert for req in reqs] == [True, False, False, False, False]
    assert scheduler._pending_chunked_abort_req is reads
    assert cache.get_single(1) is None
    assert cache.get_single(2) is not None
    # The next batch is another one.
    run(failures, scheduler, [other], [(0, 30)])
    assert other.discard_output_reason is None


def test_the_zeros_of_an_item_that_failed_are_not_kept_under_a_name_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = MultiModalStaticCache(1 << 20)
    monkeypatch.setattr(mm_schedule, "embedding_cache", cache)
    film, other, third = images(1, 2, 3)
    # A video that is not pruned, of two runs of placeholders: SGLang holds the embeddings of both under one name.
    film.offsets = [(10, 11), (13, 13)]
    failures, encoder = Failures(), Encoder(hashes=(2,))
    together = mm_schedule._get_chunked_embedding_full(
        lambda items: failures.guard_features(encoder, items, zeros),
        *([film, other], [*film.offsets, *other.offsets], 0, 30, torch.zeros(30, dtype=torch.int64)),
        torch.device("cpu"),
    )[0]
    assert together[:, 0].tolist() == [1, 1, 1, 0, 0, 0]
    cache.set(MultiModalStaticCache.combine_hashes([3]), EmbeddingResult(embedding=torch.zeros(3, 4)))
    reqs = [request(film, other), request(third), request()]
    run(failures, SimpleNamespace(chunked_req=None), reqs, [(0, 30)] * 3, 2)
    assert cache.get([1, 2]) is None
    assert cache.get([3]) is not None


def test_what_failed_on_the_first_stage_ends_on_the_stages_behind() -> None:
    first, second = Failures(), Failures()
    proxy = SimpleNamespace(tensors={"hidden_states": torch.zeros(2)})
    for each in (7, 2**64 - 1):
        first.mark(each, "no memory")
    proxy.tensors["mmtok_failed_image_8"] = torch.empty(0)  # of an earlier batch
    first.send(proxy)
    assert sum(tensor.numel() for tensor in proxy.tensors.values()) == 2
    second.receive(proxy)
    assert list(proxy.tensors) == ["hidden_states"]
    assert [second.is_marked(each) for each in (7, 2**64 - 1, 8)] == [True, True, False]
    second.receive(None)


def forward_batch(items: list[Any], first: int, length: int, mode: ForwardMode = ForwardMode.EXTEND) -> Any:
    batch = SimpleNamespace(
        forward_mode=mode,
        mm_inputs=[SimpleNamespace(mm_items=items), None],
        extend_prefix_lens_cpu=[first, 0],
        extend_seq_lens_cpu=[length, 5],
        input_ids=torch.tensor([5, VOCABULARY + 7, 99, -3]),
    )
    batch.contains_mm_inputs = lambda: batch.mm_inputs is not None
    return batch


def test_a_batch_that_fails_runs_once_more_without_its_images() -> None:
    failures, batch = Failures(), forward_batch(images(1, 2), 0, 15)
    seen: list[tuple[bool, list[int]]] = []

    def run(input_ids: Tensor) -> str:
        seen.append((batch.mm_inputs is None, input_ids.tolist()))
        if len(seen) == 1:
            raise RuntimeError("positions")
        return "output"

    assert failures.guard_forward(run, batch.input_ids, batch, VOCABULARY) == "output"
    assert seen == [(False, [5, VOCABULARY + 7, 99, -3]), (True, [5, VOCABULARY - 1, 99, 0])]
    # The second image is in no chunk yet.
    assert [failures.is_marked(each) for each in (1, 2)] == [True, False]


def test_a_batch_that_has_changed_the_models_state_is_not_run_again() -> None:
    batch, num_runs = forward_batch(images(1), 0, 15), 0

    def run(_: Tensor) -> None:
        nonlocal num_runs
        num_runs += 1
        raise RuntimeError("no memory")

    with pytest.raises(RankError, match="a batch failed that has changed the model's state: RuntimeError: no memory"):
        Failures().guard_forward(run, batch.input_ids, batch, VOCABULARY, lambda: False)
    assert num_runs == 1


@pytest.mark.parametrize(
    "batch",
    [forward_batch(images(1), 0, 9), forward_batch(images(1), 0, 15, ForwardMode.DECODE)],
    ids=["text", "decode"],
)
def test_a_batch_without_images_fails_as_sglangs_does(batch: Any) -> None:
    def run(_: Tensor) -> None:
        raise RuntimeError("positions")

    with pytest.raises(RuntimeError, match="positions"):
        Failures().guard_forward(run, batch.input_ids, batch, VOCABULARY)


def recv_req(rid: str = "7", mm_inputs: Any = None) -> Any:
    return SimpleNamespace(rid=rid, input_text="a text", mm_inputs=mm_inputs, http_worker_ipc="worker")


def not_taken_in(_scheduler: Any, _request: Any, **_: Any) -> None:
    raise TypeError("no such field")


class Scheduler:
    def __init__(self) -> None:
        self.aborts: list[Any] = []

    def send_abort_output(self, abort: Any, _req: Any) -> None:
        self.aborts.append(abort)


@pytest.mark.parametrize("mm_inputs", ["images", None])
def test_a_request_that_cannot_be_taken_in_is_answered(mm_inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, sent = Scheduler(), recv_req(mm_inputs=mm_inputs)
    Failures().take_in(not_taken_in, scheduler, sent)
    (abort,) = scheduler.aborts
    assert (abort.rid, abort.http_worker_ipc, abort.finished_reason["status_code"]) == ("7", "worker", 500)
    assert abort.finished_reason["message"] == "MMTok: the request could not be taken in (TypeError: no such field)"
    # The next pipeline stage is sent the same object, and does not try.
    monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(pp_rank=1))
    behind = Scheduler()
    Failures().take_in(lambda *_, **__: pytest.fail("tried"), behind, pickle.loads(pickle.dumps(sent)))
    assert behind.aborts == scheduler.aborts


def test_ranks_tell_one_another_of_a_text_that_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []

    def tell(error: str | None) -> bool:
        told.append(error)
        return error is not None

    monkeypatch.setattr(module, "failed_on_all_ranks", tell)
    Failures().take_in(lambda *_, **__: None, None, recv_req())
    assert told == []
    Failures().take_in(lambda *_, **__: None, None, recv_req(mm_inputs="images"))
    Failures().take_in(not_taken_in, Scheduler(), recv_req())
    assert told == [None, "MMTok: the request could not be taken in (TypeError: no such field)"]


def test_a_stage_does_not_leave_out_a_request_that_the_stage_before_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(pp_rank=1))
    ended: list[str] = []
    monkeypatch.setattr(module, "end_server", lambda error: ended.append(str(error)))
    for mm_inputs in ("images", None):
        with pytest.raises(RankError):
            Failures().take_in(not_taken_in, None, recv_req(mm_inputs=mm_inputs))
    failed = "MMTok: the request could not be taken in (TypeError: no such field)"
    assert ended == [f"MMTok: a pipeline stage failed where the stage before did not: {failed}"] * 2


# Why each of two ranks failed, whether it comes to say so, and what it finds.
RANKS: list[tuple[tuple[str | None, str | None], tuple[bool, bool], tuple[str, str]]] = [
    ((None, None), (True, True), ("False", "False")),
    (("a", "b"), (True, True), ("True", "True")),
    ((None, "b"), (True, True), ("MMTok: rank 0 of 2 did not fail where", "MMTok: rank 1 of 2 failed: b")),
    # In a collective of the encoder, say. Last: its group is of no use afterwards.
    ((None, "b"), (False, True), ("elsewhere", "MMTok: rank 1 failed while the others wait for it: b")),
]


def _rank(rank: int, folder: str) -> None:
    """Runs one of two ranks, and writes what it found."""
    found = []
    for number, (errors, comes, _) in enumerate(RANKS):
        store = f"file://{folder}/store-{number}"
        torch.distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        group = SimpleNamespace(cpu_group=torch.distributed.group.WORLD, rank_in_group=rank, world_size=2)
        vars(module)["num_ranks"] = lambda: 2
        vars(module)["get_parallel"] = lambda group=group: SimpleNamespace(tp_group=group)
        torch.distributed.barrier()
        start_s = time.monotonic()
        try:
            found.append(str(failed_on_all_ranks(errors[rank])) if comes[rank] else "elsewhere")
        except RankError as error:
            found.append(str(error))
        if not comes[rank]:
            time.sleep(4)
        found.append(f"{time.monotonic() - start_s:.3f}")
        if all(comes):
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    (Path(folder) / f"rank-{rank}").write_text("\n".join(found))


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded_spawns")
def test_ranks_agree_or_end(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    for rank in range(2):
        found = (tmp_path / f"rank-{rank}").read_text().split("\n")
        for what, seconds, (_, comes, expected) in zip(found[::2], found[1::2], RANKS, strict=True):
            assert what.startswith(expected[rank])
            assert float(seconds) < 10
            assert comes[rank] or float(seconds) >= 4


def _main_process(folder: str) -> None:
    """Has two ranks, of which one ends the server, and writes what became of them."""
    told: list[int] = []
    signal.signal(signal.SIGQUIT, lambda number, _: told.append(number))
    stuck, other = _child("sglang::scheduler_TP0"), _child("sglang::detokenizer")
    failed = os.fork()
    if failed == 0:
        module.end_server(RankError("rank 1 failed"))
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (failed, stuck)]
    is_left = os.waitpid(other, os.WNOHANG) == (0, 0)
    os.kill(other, signal.SIGKILL)
    (Path(folder) / "found").write_text(f"{told == [signal.SIGQUIT]} {ended} {is_left}")


def _child(title: str) -> int:
    pid = os.fork()
    if pid == 0:
        setproctitle.setproctitle(title)
        time.sleep(60)
        os._exit(0)
    while title not in Path(f"/proc/{pid}/cmdline").read_text():
        time.sleep(0.01)
    return pid


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded_spawns")
def test_a_rank_ends_the_ranks_and_tells_the_main_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_main_process, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert (tmp_path / "found").read_text() == f"True [1, {-signal.SIGKILL}] True"
