"""The C++ selection and the pruner around it, compiled here.

TensorRT-Edge-LLM itself needs TensorRT and a GPU: `edge_llm/stub` declares the part of its interface that is used.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmtok_deploy.config import Coverage, SelectionConfig
from mmtok_deploy.greedy_replay import replay_greedy
from mmtok_deploy.problem import Selection
from tests.mmtok_deploy.problems import GOLDEN_NAMES, Problem, assert_greedy, golden, random_problem

HERE = Path(__file__).parent / "edge_llm"
SOURCES = Path(__file__).parents[2] / "examples" / "edge_llm"
COVERAGES: tuple[Coverage, ...] = ("multimodal", "text", "vision")
TEXT = SelectionConfig(coverage="text")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("edge_llm") / "libcalls.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC"]
    includes = [f"-I{HERE / 'stub'}", f"-I{SOURCES}"]
    sources = [str(HERE / "calls.cpp"), *map(str, sorted(SOURCES.glob("*.cpp")))]
    subprocess.run(["g++", *flags, *includes, *sources, "-o", str(path)], check=True, timeout=120)
    return ctypes.CDLL(str(path))


def address(values: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.data_ptr())


def constants_of(config: SelectionConfig) -> tuple[Tensor, int]:
    return torch.tensor([config.tv_temp, config.vv_temp, config.alpha]), COVERAGES.index(config.coverage)


def select(library: ctypes.CDLL, problem: Problem, budget: int, config: SelectionConfig) -> Selection:
    vision, keys, text = (each.float().contiguous() for each in (problem.vision, problem.keys, problem.text))
    excluded = torch.empty(0, dtype=torch.uint8) if problem.excluded is None else problem.excluded.to(torch.uint8)
    sizes = torch.tensor([*vision.shape, *keys.shape, len(text), budget, len(excluded)])
    constants, coverage = constants_of(config)
    order, kept = (torch.empty(max(budget, 1), dtype=torch.int32) for _ in range(2))
    curve, total = torch.empty(max(budget, 1)), torch.empty(1)
    error = ctypes.create_string_buffer(256)
    inputs = [address(each) for each in (vision, keys, text, excluded, sizes, constants)]
    outputs = [address(each) for each in (order, kept, curve, total)]
    num_picks = library.selectTokens(*inputs, coverage, *outputs, error)
    if num_picks < 0:
        raise ValueError(error.value.decode())
    return Selection(order[:num_picks].long(), kept[:num_picks].long(), curve[:num_picks], total[0])


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(library: ctypes.CDLL, name: str) -> None:
    case = golden(name)
    selection = select(library, case.problem, case.budget, case.config)
    assert_greedy(selection, case.given(), case.config)
    assert selection.order.tolist() == case.order
    assert selection.kept.tolist() == case.kept


@pytest.mark.parametrize("coverage", COVERAGES)
@pytest.mark.parametrize(("num_tokens", "budget"), [(1, 1), (17, 5), (40, 40), (40, 99)])
def test_each_coverage_and_size(library: ctypes.CDLL, coverage: Coverage, num_tokens: int, budget: int) -> None:
    problem = random_problem(num_tokens, excluded=[3, 4] if num_tokens > 4 else None)
    config = SelectionConfig(coverage=coverage)
    assert_greedy(select(library, problem, budget, config), problem.picking(budget), config)


def test_without_text(library: ctypes.CDLL) -> None:
    problem = random_problem(30, num_words=0)
    assert_greedy(select(library, problem, 7, SelectionConfig()), problem.picking(7))


def test_of_equal_gains_the_lowest_index_wins(library: ctypes.CDLL) -> None:
    problem = Problem(torch.eye(8), torch.eye(8), torch.ones(1, 8))
    assert select(library, problem, 8, SelectionConfig()).order.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("problem", "budget", "config", "message"),
    [
        (random_problem(5), 0, SelectionConfig(), "budget is at least 1"),
        (Problem(torch.ones(5, 8), torch.ones(4, 6), torch.ones(1, 8)), 2, SelectionConfig(), "expected 5, got 4"),
        (Problem(torch.ones(5, 8), torch.ones(5, 6), torch.ones(0, 8)), 2, TEXT, "needs a row of text"),
        (
            Problem(torch.full((5, 8), torch.nan), torch.ones(5, 6), torch.ones(1, 8)),
            2,
            SelectionConfig(),
            "not finite",
        ),
        (
            Problem(torch.ones(5, 8), torch.full((5, 6), torch.inf), torch.ones(1, 8)),
            2,
            SelectionConfig(),
            "not finite",
        ),
    ],
)
def test_bad_input(library: ctypes.CDLL, problem: Problem, budget: int, config: SelectionConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(library, problem, budget, config)


def prune(
    library: ctypes.CDLL,
    embeddings: Tensor,
    spans: list[tuple[int, int, int]],
    keys: Tensor | None,
    config: SelectionConfig,
) -> tuple[int, list[int]]:
    """Returns the new length and the positions of the vision tokens that are kept."""
    constants, coverage = constants_of(config)
    places = torch.tensor(spans, dtype=torch.int32)
    kept = torch.full((int(places[:, 2].sum()),), -1, dtype=torch.int32)
    error = ctypes.create_string_buffer(256)
    keys_width = 0 if keys is None else keys.shape[1]
    length = library.prune(
        address(embeddings), *map(ctypes.c_int64, embeddings.shape), address(places), ctypes.c_int64(len(spans)),
        None if keys is None else address(keys), ctypes.c_int64(keys_width), address(constants), coverage,
        address(kept), error,
    )  # fmt: skip
    if length < 0:
        raise ValueError(error.value.decode())
    return length, kept.tolist()


def prompt(*problems: Problem) -> tuple[Tensor, list[tuple[int, int]]]:
    """Returns the float16 embeddings of a Qwen's prompt, and where each image is: the last problem's text asks."""
    generator = torch.Generator().manual_seed(1)

    def other(num_tokens: int) -> Tensor:
        return torch.randn(num_tokens, problems[0].vision.shape[1], generator=generator)

    rows, places, begin = [other(4)], [], 4
    for problem in problems:
        rows += [problem.vision, other(1)]
        places.append((begin, begin + len(problem)))
        begin += len(problem) + 1
    return torch.cat([*rows, problems[-1].text, other(5)]).half(), places


@pytest.mark.parametrize("coverage", COVERAGES)
def test_the_pruner_keeps_what_the_selection_does(library: ctypes.CDLL, coverage: Coverage) -> None:
    problems = [random_problem(30, seed=1), random_problem(50, seed=2)]
    embeddings, places = prompt(*problems)
    config = SelectionConfig(coverage=coverage)
    spans = [(begin, end, budget) for (begin, end), budget in zip(places, (7, 20), strict=True)]
    keys = None if coverage == "text" else torch.cat([problem.keys for problem in problems])
    length, kept = prune(library, embeddings, spans, keys, config)
    assert length == len(embeddings) - 30 - 50 + 7 + 20
    assert len(set(kept)) == 27
    for problem, (begin, end, budget) in zip(problems, spans, strict=True):
        seen = Problem(embeddings[begin:end].float(), problem.keys, problems[-1].text.half().float())
        chosen = [position - begin for position in kept if begin <= position < end]
        # The pruner says which are kept, not in which order: those of the selection, whose order is held to be greedy.
        selection = select(library, seen, budget, config)
        replay_greedy(seen.picking(budget), config, selection.order.tolist())
        assert chosen == selection.kept.tolist()


def test_every_half_precision_number_is_read(library: ctypes.CDLL) -> None:
    # Multiples of float16's smallest number, of either sign, below and above its smallest normal one, 1024 of them.
    generator = torch.Generator().manual_seed(0)
    multiples = torch.randint(-3000, 3000, (36, 8), generator=generator)
    assert 50 < int((multiples.abs() < 1024).sum()) < 238
    embeddings = (multiples * 2.0**-24).half()
    seen = Problem(embeddings[1:25].float(), torch.ones(24, 1), embeddings[26:31].float())
    expected = select(library, seen, 9, TEXT)
    replay_greedy(seen.picking(9), TEXT, expected.order.tolist())
    _, kept = prune(library, embeddings, [(1, 25, 9)], None, TEXT)
    assert [position - 1 for position in kept] == expected.kept.tolist()


def test_the_pruner_needs_keys_or_the_coverage_of_the_text(library: ctypes.CDLL) -> None:
    embeddings, places = prompt(random_problem(30))
    with pytest.raises(ValueError, match=r"set PrunerOptions::keys, or config\.coverage to Coverage::kText"):
        prune(library, embeddings, [(*places[0], 7)], None, SelectionConfig())


def test_a_prompt_without_a_question_is_left_as_it_is(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    problem = random_problem(30, num_words=0)
    embeddings, places = prompt(problem)
    assert prune(library, embeddings, [(*places[0], 7)], None, TEXT) == (len(embeddings), [-1] * 7)
    assert "the prompt has no question" in capfd.readouterr().err
    length, kept = prune(library, embeddings, [(*places[0], 7)], problem.keys, SelectionConfig())
    assert (length, -1 in kept) == (len(embeddings) - 23, False)
