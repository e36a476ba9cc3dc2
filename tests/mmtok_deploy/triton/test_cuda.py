"""The Triton backend on a GPU: right, never waiting for the host, and capturable in a CUDA graph."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
import torch

from mmtok_deploy import SelectionConfig, select_tokens
from mmtok_deploy.backends import get_backend
from mmtok_deploy.config import Coverage
from mmtok_deploy.problem import SelectionProblem
from tests.mmtok_deploy.problems import GOLDEN_NAMES, Problem, assert_greedy, golden, mask_of, random_problem

pytest.importorskip("triton")
import triton

from mmtok_deploy.backends import triton as backend
from mmtok_deploy.backends.triton_plan import LONE_CANDIDATES, FeatureTypes, Team

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEFAULT = SelectionConfig()
ALONE = Team(1, LONE_CANDIDATES, is_meeting=False)
TEAMS = (ALONE, *(Team(num, max(4, 64 // num), is_meeting=True) for num in (1, 4, 16, 64, 128)))
SHAPES = [(2880, 160), (1728, 96), (576, 32), (577, 16), (33, 33), (1, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def made(num_tokens: int, num_picks: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> SelectionProblem:
    """Returns features as an encoder's: neighbours alike, all of one general direction."""
    generator = torch.Generator().manual_seed(seed)

    def rows(num_rows: int, width: int) -> torch.Tensor:
        noise = torch.randn(num_rows, width, generator=generator)
        alike = torch.randn(num_rows // 9 + 1, width, generator=generator).repeat_interleave(9, dim=0)[:num_rows]
        return (noise + 2 * alike + torch.randn(width, generator=generator)).to("cuda", dtype)

    return SelectionProblem(rows(num_tokens, 512), rows(num_tokens, 256), rows(24, 512), num_picks)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where PyTorch would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TestAnswer:
    @pytest.mark.parametrize("team", TEAMS, ids=str)
    @pytest.mark.parametrize("name", GOLDEN_NAMES)
    def test_golden(self, name: str, team: Team) -> None:
        case = golden(name)
        (selection,) = backend._select_together([case.given("cuda")], case.config, team)
        assert selection.order.tolist() == case.order
        assert selection.kept.tolist() == case.kept

    @pytest.mark.parametrize("config", sorted({golden(name).config for name in GOLDEN_NAMES}, key=repr), ids=repr)
    def test_a_batch_of_all_golden(self, config: SelectionConfig) -> None:
        cases = [case for case in map(golden, GOLDEN_NAMES) if case.config == config]
        selections = backend.select([case.given("cuda") for case in cases], config)
        assert [selection.order.tolist() for selection in selections] == [case.order for case in cases]
        assert [selection.kept.tolist() for selection in selections] == [case.kept for case in cases]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("num_tokens", "num_picks"), SHAPES)
    def test_random(self, num_tokens: int, num_picks: int, dtype: torch.dtype) -> None:
        for coverage in get_args(Coverage):
            config = SelectionConfig(coverage=coverage)
            problem = made(num_tokens, num_picks, dtype)
            (selection,) = backend.select([problem], config)
            assert_greedy(selection, problem, config)

    @pytest.mark.parametrize("team", TEAMS, ids=str)
    @pytest.mark.parametrize("num_problems", [1, 2])
    def test_every_team_picks_the_same(self, team: Team, num_problems: int) -> None:
        if team.num_programs * num_problems > torch.cuda.get_device_properties(0).multi_processor_count:
            pytest.skip("a cooperative launch of more programs than multiprocessors, which no plan makes")
        problems = [made(1300 - 500 * seed, 90, seed=seed) for seed in range(num_problems)]
        for selection, problem in zip(backend._select_together(problems, DEFAULT, team), problems, strict=True):
            assert_greedy(selection, problem, DEFAULT)

    @pytest.mark.parametrize("num_problems", [8, 32, 200])
    def test_ragged_batch(self, num_problems: int) -> None:
        problems = [made(20 + 37 * (seed % 16), 5 + seed % 9, seed=seed) for seed in range(num_problems)]
        for selection, problem in zip(backend.select(problems, DEFAULT), problems, strict=True):
            assert_greedy(selection, problem, DEFAULT)

    def test_equal_launches_give_equal_bits(self) -> None:
        problem = made(2000, 100, torch.bfloat16)
        first, second = (backend.select([problem], DEFAULT)[0] for _ in range(2))
        for field in dataclasses.fields(first):
            assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name

    def test_by_name(self) -> None:
        problem = random_problem(90, excluded=[3, 4]).picking(40, "cuda")
        features = (problem.vision, problem.keys, problem.text, problem.num_picks)
        assert_greedy(select_tokens(*features, excluded=problem.excluded, backend="triton"), problem)
        assert get_backend("triton", problem.vision.device) is backend.select


class TestAdversarial:
    @pytest.mark.parametrize("team", TEAMS, ids=str)
    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_all_tokens_equal(self, value: float, team: Team) -> None:
        # Unit rows of quarters and halves: every product is exact in float32.
        same = Problem(
            torch.full((700, 16), value), torch.full((700, 4), value), torch.ones(3, 16), mask_of([0, 5], 700)
        )
        (selection,) = backend._select_together([same.picking(90, "cuda")], DEFAULT, team)
        assert selection.order.tolist() == [token for token in range(92) if token not in (0, 5)]

    @pytest.mark.parametrize("team", TEAMS, ids=str)
    def test_duplicates(self, team: Team) -> None:
        case = random_problem(300).take(torch.arange(600) % 300)
        (selection,) = backend._select_together([case.picking(600, "cuda")], DEFAULT, team)
        assert selection.kept.tolist() == list(range(600))
        assert_greedy(selection, case.picking(600, "cuda"), DEFAULT)

    @pytest.mark.parametrize("team", TEAMS, ids=str)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["vision", "keys", "text"])
    def test_features_that_are_not_finite(self, name: str, value: float, team: Team) -> None:
        problem = made(700, 60)
        getattr(problem, name)[1, 2] = value
        (selection,) = backend._select_together([problem], DEFAULT, team)
        assert not torch.isfinite(selection.total)
        assert len(set(selection.order.tolist())) == 60
        assert selection.kept.tolist() == sorted(selection.order.tolist())
        assert 0 <= selection.kept[0] <= selection.kept[-1] < 700


class TestHost:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("num_tokens", "num_problems"), [(2880, 1), (576, 3), (130, 40)])
    def test_nothing_waits_for_the_device(self, num_tokens: int, num_problems: int, dtype: torch.dtype) -> None:
        problems = [made(num_tokens, 20, dtype, seed) for seed in range(num_problems)]
        mask = torch.arange(num_tokens, device="cuda") % 7 == 0
        problems = [dataclasses.replace(problem, excluded=mask) for problem in problems]
        backend.select(problems, DEFAULT)
        # Shapes that are new: also what the host prepares for them must not wait.
        shorter = [dataclasses.replace(problem, num_picks=19) for problem in problems]
        with no_waiting():
            again, fewer = backend.select(problems, DEFAULT), backend.select(shorter, DEFAULT)
        for selection, nested in zip(again, fewer, strict=True):
            assert torch.equal(selection.order[:19], nested.order)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("num_tokens", "num_problems"), [(2880, 1), (576, 3), (130, 40)])
    def test_cuda_graph(self, num_tokens: int, num_problems: int, dtype: torch.dtype) -> None:
        static = [made(num_tokens, 20, dtype, seed) for seed in range(num_problems)]
        backend.select(static, DEFAULT)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = backend.select(static, DEFAULT)
        for round_idx in (1, 2):
            fresh = [made(num_tokens, 20, dtype, 100 * round_idx + seed) for seed in range(num_problems)]
            for old, new in zip(static, fresh, strict=True):
                for name in ("vision", "keys", "text"):
                    getattr(old, name).copy_(getattr(new, name))
            graph.replay()
            for selection, expected in zip(captured, backend.select(fresh, DEFAULT), strict=True):
                assert torch.equal(selection.order, expected.order)
                assert torch.equal(selection.coverage, expected.coverage)

    def test_capturing_shapes_not_seen_before_says_what_to_do(self) -> None:
        problem = made(47, 11)
        graph = torch.cuda.CUDAGraph()
        message = "select once before with problems of the same shapes"
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
            backend.select([problem], DEFAULT)
        torch.cuda.synchronize()

    def test_on_another_stream(self) -> None:
        problem = made(600, 30)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            (selection,) = backend.select([problem], DEFAULT)
        stream.synchronize()
        assert_greedy(selection, problem)


class TestLoad:
    TYPES = FeatureTypes(torch.bfloat16, torch.float32, 512, 256)  # as Qwen2.5-VL's: keys are means, in float32

    def test_500_batches_compile_nothing_after_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        backend.load_kernels(self.TYPES, DEFAULT, device)
        compiled: list[str] = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["fn"].name)
        )
        draw = random.Random(0)
        pools = {
            name: torch.randn(20000, width, device=device).to(dtype)
            for name, width, dtype in (("vision", 512, torch.bfloat16), ("keys", 256, torch.float32))
        }

        def rows(name: str, num_rows: int) -> torch.Tensor:
            start = draw.randrange(len(pools[name]) - num_rows)
            return pools[name][start : start + num_rows]

        for _ in range(500):
            problems = []
            most = draw.choice((64, 600, 3000))
            for _ in range(draw.choice((1, 1, 1, 2, 3, 5, 8, 16, 40))):
                num_tokens = draw.randint(1, most)
                mask = torch.zeros(num_tokens + 1, dtype=torch.bool, device=device)[draw.randint(0, 1) :][:num_tokens]
                features = (rows("vision", num_tokens), rows("keys", num_tokens), rows("vision", draw.randint(0, 80)))
                num_picks = draw.randint(1, -(-num_tokens // 9))
                problems.append(SelectionProblem(*features, num_picks, draw.choice((None, None, mask))))
            selections = backend.select(problems, DEFAULT)
            assert all(selection.total.isfinite() for selection in selections)
        assert compiled == []
