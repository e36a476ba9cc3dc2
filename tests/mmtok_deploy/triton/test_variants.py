"""Every launch is of a variant that can be compiled beforehand, as Triton itself tells kernels apart.

Without a GPU: Triton runs on a driver that says it is an H100 and launches nothing. What it specialises kernels by, it
finds out from the arguments by its own code.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from mmtok_deploy import SelectionConfig
from mmtok_deploy.config import Coverage
from mmtok_deploy.problem import SelectionProblem

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import MockTensor, compute_cache_key  # noqa: E402

from mmtok_deploy.backends import triton as backend  # noqa: E402
from mmtok_deploy.backends import triton_launch, triton_plan  # noqa: E402
from mmtok_deploy.backends.triton_launch import KERNELS  # noqa: E402
from mmtok_deploy.backends.triton_plan import (  # noqa: E402
    MAX_TOKENS,
    BatchSize,
    FeatureTypes,
    Launch,
    Variant,
    plan,
    variants,
)

CPU = torch.device("cpu")
COVERAGES: tuple[Coverage, ...] = get_args(Coverage)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = ((4096, 1024), (3584, 1280), (30, 7), (1, 1))
# A quarter of an A100 has 28, an RTX A6000 84, an A100 108, an H100 132 and an RTX PRO 6000 188.
MULTIPROCESSORS = (28, 84, 108, 132, 188)
MAX_PROBLEMS, MAX_WORDS = 64, 512


class Utils:
    """What Triton asks of the CUDA driver."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    @staticmethod
    def load_binary(*kernel: object) -> tuple[int, int, int, int, int]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def unload_module(module: int) -> None:
        pass


class H100:
    """A driver that compiles for an H100, and keeps the launches."""

    utils = Utils

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[Any, ...]]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append((source.fn.__name__, arguments))

    def get_current_device(self) -> None:
        return None  # as a CPU tensor's device index

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[H100]:
    found = H100()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(backend, "_num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(triton_launch, "_loaded", {})
    monkeypatch.setattr(triton_launch, "_are_loaded", set())
    for kernel in KERNELS.values():
        kernel.device_caches.clear()
    yield found
    for kernel in KERNELS.values():
        kernel.device_caches.clear()


def key_of(variant: Variant, arguments: tuple[Any, ...]) -> str:
    """Returns what Triton tells kernels apart by, for a launch with these arguments."""
    kernel = KERNELS[variant.kernel]
    *_, binder = kernel.device_caches[None]
    _, specialization, options = binder(*arguments, **dict(variant.constants), **dict(variant.options))
    key: str = compute_cache_key({}, specialization, options)
    return variant.kernel + key


def key_when_loaded(variant: Variant) -> str:
    return key_of(variant, tuple(map(MockTensor.wrap_dtype, variant.arguments)))


class TestClosedSet:
    """For every number of tokens, words and problems, dtype, coverage and mask."""

    @pytest.mark.parametrize(
        "num_multiprocessors",
        [132, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MULTIPROCESSORS if each != 132)],
    )
    def test_picks(self, num_multiprocessors: int) -> None:
        """They depend on the sizes alone."""
        types = FeatureTypes(torch.bfloat16, torch.bfloat16, 4096, 1024)
        known = set(variants(types, "multimodal", num_multiprocessors))
        found = set()
        for num_tokens in range(1, MAX_TOKENS + 1):
            sizes = (BatchSize(num_problems, num_tokens, 0, 0) for num_problems in range(1, MAX_PROBLEMS + 1))
            teams = {triton_plan._choose_team(size, num_multiprocessors) for size in sizes}
            found |= {triton_plan._greedy_picks(team, num_tokens) for team in teams}
        assert found == {variant for variant in known if variant.kernel == "greedy_picks"}

    @pytest.mark.parametrize("coverage", COVERAGES)
    def test_all_others(self, coverage: Coverage) -> None:
        """They do not depend on the number of problems, and on words by whether there are any."""
        mixed = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32))
        for vision, keys in (*zip(DTYPES, DTYPES, strict=True), *mixed):
            types = FeatureTypes(vision, keys, 4096, 1024)
            known = set(variants(types, coverage, 132))
            found = set()
            words = {"text": (1,), "vision": (0,)}.get(coverage, (0, 1))
            for num_tokens, num_words in itertools.product(range(1, MAX_TOKENS + 1), words):
                size = BatchSize(1, num_tokens, num_words, num_tokens + 32)
                for has_excluded in (False, True) if num_tokens < 9 else (False,):
                    launches = plan.__wrapped__(size, types, coverage, has_excluded, 132).launches
                    found |= {launch.variant for launch in launches}
            assert found <= known
            # But for batches, whose picks are another test's.
            assert {each for each in known - found if each.kernel != "greedy_picks"} == set()

    def test_what_it_does_not_depend_on(self) -> None:
        types = FeatureTypes(torch.float16, torch.float32, 4096, 1024)

        def planned(size: BatchSize) -> list[Variant]:
            return [launch.variant for launch in plan.__wrapped__(size, types, "multimodal", False, 132).launches]

        for num_tokens in (1, 576, 1024, 2880, MAX_TOKENS):
            for num_words in range(1, MAX_WORDS + 1):
                size = BatchSize(1, num_tokens, num_words, num_tokens + num_words)
                assert planned(size) == planned(size._replace(max_words=1, max_rows=1))
            for num_problems in range(1, MAX_PROBLEMS + 1):
                size = BatchSize(num_problems, num_tokens, 1, 32)
                assert planned(size)[:-1] == planned(size._replace(num_problems=1))[:-1]

    @pytest.mark.parametrize("num_tokens", [576, 2880])
    def test_of_one_image_size_are_fewer(self, num_tokens: int) -> None:
        types = FeatureTypes(torch.float16, torch.float16, 4096, 1024)
        some, every = variants(types, "multimodal", 132, (num_tokens, num_tokens)), variants(types, "multimodal", 132)
        assert set(some) < set(every)
        assert len(some) == 12
        assert len(every) == 33

    def test_triton_tells_no_more_apart(self, h100: H100) -> None:
        types = FeatureTypes(torch.bfloat16, torch.float32, 3584, 1280)
        every = variants(types, "multimodal", 132)
        assert len({key_when_loaded(variant) for variant in every}) == len(every)


class TestArguments:
    """What a launch passes is what its variant says, so that Triton would not compile anything else for it."""

    @pytest.fixture
    def launches(self, h100: H100, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Launch, tuple[Any, ...]]]:
        found: list[tuple[Launch, tuple[Any, ...]]] = []
        monkeypatch.setattr(backend, "launch", lambda what, device, *arguments: found.append((what, arguments)))
        return found

    @pytest.mark.slow
    @pytest.mark.parametrize("widths", WIDTHS)
    @pytest.mark.parametrize("coverage", COVERAGES)
    def test_any_batch(
        self, coverage: Coverage, widths: tuple[int, int], launches: list[tuple[Launch, tuple[Any, ...]]]
    ) -> None:
        draw = random.Random(f"{coverage} {widths}")
        for _ in range(25):
            launches.clear()
            vision, keys = draw.choice(DTYPES), draw.choice(DTYPES)
            problems = [random_problem(draw, *widths, vision, keys) for _ in range(draw.choice((1, 1, 2, 3, 40)))]
            # Integers where the types say float, as a caller's config may hold.
            config = SelectionConfig(tv_temp=draw.choice((0.02, 1)), alpha=draw.choice((0.5, 1)), coverage=coverage)
            backend._select_together(problems, config)
            assert launches
            known = set(variants(FeatureTypes(vision, keys, *widths), coverage, 132))
            for what, arguments in launches:
                assert key_of(what.variant, arguments) == key_when_loaded(what.variant)
                assert what.variant in known

    def test_integers_of_every_size(self, h100: H100) -> None:
        """Those that no variant says: tiles a row, and rows of all problems."""
        size = BatchSize(1, 576, 1, 640)
        types = FeatureTypes(torch.float32, torch.float32, 4096, 1024)
        made = plan(size, types, "multimodal", False, 132)
        assert made.words is not None
        assert made.weights is not None
        num_rows = range(32, MAX_PROBLEMS * (MAX_TOKENS + MAX_WORDS) + 1, 32)
        for variant, place, numbers in (
            (made.words.variant, 9, range(1, 257)),
            (made.weights.variant, 5, range(1, 257)),
            (made.picks.variant, 10, num_rows[:: len(num_rows) // 1000]),
        ):
            arguments = list(map(MockTensor.wrap_dtype, variant.arguments))
            expected = key_when_loaded(variant)
            for number in (*numbers, numbers[-1]):
                arguments[place] = number
                assert key_of(variant, tuple(arguments)) == expected


def random_problem(
    draw: random.Random, vision_width: int, keys_width: int, vision_dtype: torch.dtype, keys_dtype: torch.dtype
) -> SelectionProblem:
    """Returns features at any address, contiguous or not."""
    num_tokens = draw.choice((1, 2, 31, 64, 65, 150))
    num_picks = draw.randint(1, num_tokens)

    def rows(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        offset = draw.choice((0, 0, 1, 3, 8))
        flat = torch.zeros(offset + 2 * num_rows * width + 1, dtype=dtype)[offset:]
        if draw.random() < 0.3:
            return flat[: 2 * num_rows * width].view(num_rows, 2 * width)[:, :width]
        return flat[: num_rows * width].view(num_rows, width)

    mask = torch.zeros(num_tokens + 3, dtype=torch.bool)[draw.randint(0, 3) :][:num_tokens]
    return SelectionProblem(
        rows(num_tokens, vision_width, vision_dtype),
        rows(num_tokens, keys_width, keys_dtype),
        rows(draw.choice((1, 5, 40)), vision_width, vision_dtype),
        num_picks,
        draw.choice((None, mask)),
    )


class TestLoad:
    TYPES = FeatureTypes(torch.float16, torch.float16, 64, 32)

    def problems(self, num_problems: int, num_tokens: int = 1030) -> list[SelectionProblem]:
        vision, keys, text = (
            torch.ones(shape, dtype=torch.float16) for shape in ((num_tokens, 64), (num_tokens, 32), (9, 64))
        )
        return [SelectionProblem(vision, keys, text, 5 + num) for num in range(num_problems)]

    def test_nothing_is_compiled_after_it(
        self, h100: H100, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        compiled: list[str] = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["fn"].name)
        )
        config = SelectionConfig(coverage="vision")
        every = variants(self.TYPES, "vision", 132, (1030, 1030))
        with caplog.at_level(logging.INFO):
            triton_launch.load(every, CPU)
        assert len(compiled) == len(every)
        assert f"{len(every)} kernels loaded in" in caplog.messages[-1]
        compiled.clear()
        for num_problems in (1, 2, 3, 5, 9, 17, 34):
            backend._select_together(self.problems(num_problems), config)
        assert compiled == []
        assert len(h100.launched) == 7 * 4

        # Another size: compiled, and said.
        backend._select_together(self.problems(1, 100), config)
        assert compiled
        assert "compiling a Triton kernel that was not loaded before" in caplog.text

    def test_launches_as_triton_does(self, h100: H100, monkeypatch: pytest.MonkeyPatch) -> None:
        """Past Triton's look-up, a kernel is launched with the arguments that Triton would pass to it."""
        asked: list[tuple[Launch, tuple[Any, ...]]] = []
        really = triton_launch.launch

        def launch(what: Launch, device: torch.device, *arguments: Any) -> None:
            asked.append((what, arguments))
            really(what, device, *arguments)

        monkeypatch.setattr(backend, "launch", launch)
        backend._select_together(self.problems(3), SelectionConfig(coverage="vision"))
        ours, h100.launched = h100.launched, []
        for what, arguments in asked:
            KERNELS[what.variant.kernel][what.grid](
                *arguments, **dict(what.variant.constants), **dict(what.variant.options)
            )
        assert len(ours) == len(h100.launched) == 4
        for (our_name, our_arguments), (name, expected) in zip(ours, h100.launched, strict=True):
            assert our_name == name
            assert len(our_arguments) == len(expected)
            # The seventh is made for profilers, anew at each launch.
            pairs = [pair for place, pair in enumerate(zip(our_arguments, expected, strict=True)) if place != 6]
            assert all(one is other or one == other for one, other in pairs)
