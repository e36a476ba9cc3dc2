"""The same examples on every run, and who works beside whom.

Hypothesis draws the same examples each time and keeps none between runs.
"""

from tests import environment  # noqa: F401, I001 - first: it sets variables that PyTorch and SGLang read

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, get_args

import pytest
from hypothesis import settings

from mmtok_bench.families import FamilyName
from tests.preloaded_server import Templates, preloaded_servers
from tests.rounding import PerturbedProducts

settings.register_profile("mmtok", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("mmtok")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--perturb-products",
        type=int,
        metavar="SEED",
        help="give matrix products on the CPU other last bits, as another processor would",
    )
    parser.addoption(
        "--fresh-servers",
        action="store_true",
        help="start every server as users do: importing SGLang, not forked from a process that has imported it",
    )


@pytest.fixture(autouse=True, scope="session")
def _perturbed_products(request: pytest.FixtureRequest) -> Iterator[None]:
    seed = request.config.getoption("--perturb-products")
    with nullcontext() if seed is None else PerturbedProducts(seed):
        yield


@pytest.fixture(autouse=True, scope="session")
def templates(request: pytest.FixtureRequest) -> Iterator[Templates | None]:
    """Processes that have imported SGLang, whose forks the servers are; none with --fresh-servers."""
    if request.config.getoption("--fresh-servers"):
        yield None
    else:
        with preloaded_servers() as templates:
            yield templates


@pytest.fixture
def preloaded_spawns(templates: Templates | None) -> Iterator[None]:
    """Spares the processes that a test spawns the import of SGLang."""
    from mmtok_bench.server import cpu_environment

    with nullcontext() if templates is None else templates.of(cpu_environment()).spawns():
        yield


class RunPython(Protocol):
    def __call__(self, *arguments: str, variables: Mapping[str, str] = ...) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def run_python(templates: Templates | None) -> RunPython:
    """Runs `python` with these arguments, with SGLang imported already, and returns what it printed."""
    from mmtok_bench.server import cpu_environment

    def run(*arguments: str, variables: Mapping[str, str] = MappingProxyType({})) -> subprocess.CompletedProcess[str]:
        every = {**os.environ, **cpu_environment(), **variables}
        if templates is None:
            command = [sys.executable, *arguments]
            return subprocess.run(command, env=every, capture_output=True, text=True, timeout=300)
        return templates.of(cpu_environment()).run(arguments, every)

    return run


@pytest.fixture(autouse=True)
def _only_slow_tests_start_servers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts a server without the mark `slow`: `make test-fast` starts none."""
    server = sys.modules.get("mmtok_bench.server")
    if server is not None and request.node.get_closest_marker("slow") is None:
        start = server.SglangServer.start

        def checked(given: Any) -> None:
            if "sglang.launch_server" in given.command:
                pytest.fail("this test starts a server: mark it with @pytest.mark.slow")
            start(given)

        monkeypatch.setattr(server.SglangServer, "start", checked)


# Where several processes work (`pytest -n 2`).


# What takes minutes, and whose code `make test` runs by another family's or setting's test.
_EXHAUSTIVE = re.compile(
    r"test_serving_processes\.py::test_two_ranks\[llava-"
    r"|test_serving_chunks\.py::.*\[(llava-1\.5|qwen3-vl(\]|-frame|-video)|qwen3\.5|internvl3|glm)"
    r"|test_serving_chunks\.py::test_(chunks_end_anywhere_in_a_film\[qwen3-vl-graphs-frame|films_that_drive_each_other_out"
    r"_between_chunks\[qwen3-vl-graphs)"
    r"|test_serving_hook_errors\.py::test_an_error_at_any_call\w*\[.*-(tp2|pp2)-?\w*-(clone|count|counts|fallen|key"
    r"|owners|spans|write)\]"
    r"|test_serving_engine\.py::.*\[llava-next"
    r"|test_serving_agent\.py::.*\[llava-"
    r"|test_serving_tiles\.py"
    r"|test_serving\w*\.py::(?!.*\[qwen2-vl-one image\]).*(qwen2-vl|qwen3(-vl|\.5)-moe|glm-4\.5v)"
    r"|test_serving_(adapters|processes|methods|scale|bounds|entry_points|engine|agent|faults|hook_errors)\.py::.*"
    r"(qwen3-vl|qwen3\.5|internvl3|glm)"
    r"|test_serving_repeats\.py::.*(qwen3\.5|internvl3|llava-1|glm)"
    r"|test_serving_cache\.py::.*(qwen3-vl|internvl3|glm)"
    r"|test_serving_cache\.py::test_blank_pages_of_different_shapes\w*\[((llava-1\.5|qwen3\.5)-.*-(10|25)%|llava-next-.*-25%)"
    r"|test_serving_(bounds|entry_points)\.py::(?!test_the_account_of_an_answer).*\[llava-next"
    r"|test_serving_faults\.py::test_fuzzed_bodies\[llava-1\.5"
    r"|test_serving_examples\.py::.*\[(llava-next|qwen3|internvl3|glm)"
    r"|test_serving\.py::test_question_of_four_thousand_words\[(llava-next|internvl3|glm)"
    r"|test_serving\.py::test_bad_fields_are_refused_by_name\[(llava-next|qwen3(-vl|\.5)|internvl3|glm)"
    r"|test_serving_video\.py::.*\[qwen3\.5"
    r"|test_serving\.py::test_(more_positions_than_the_context|question_of_four_thousand_words)\[(qwen3(-vl|\.5)|glm)"
    r"|test_processor\.py::.*\[qwen2"
    r"|test_recorded\.py::.*(\[llava-1\.5|-100\])"
    r"|test_serving_processes\.py::test_two_tokenizer_workers"
    r"|test_served\.py::test_the_model_as_its_own_agent"
    r"|serve/test_command\.py::test_a_sweep_one_of_whose_servers_dies"
    r"|test_compiled\.py::test_nothing_spills\[(2880|16384|576-float16).*-(80|89|100|120)\]"
    r"|test_interpreted\.py::TestGolden::test_small\[(alpha2_n256_k16|qwen_n(144_k143|256_k32))"
    r"|test_interpreted\.py::TestTeam::test_of_one_meets_itself\[qwen"
    r"|test_interpreted\.py::TestTeam::test_a_program_that_stops_is_given_up\[(0|2)-0\]"
    r"|test_interpreted\.py::TestTies::test_all_tokens_equal\[(0-0\.0|3-1\.0)\]"
    r"|test_interpreted\.py::TestNotFinite::.*\[(keys|text)--inf\]"
    r"|test_interpreted\.py::TestAnswer::test_every_token\[(text|vision)"
    r"|test_interpreted\.py::TestGolden::test_large\[(llava_n576_k64|qwen_n576_k(4|64)|.*_(k192|n729_k73|n1024_k51))"
    r"|exporters/test_encoder\.py::test_images_of_any_size\[(qwen2|glm)"
    r"|test_encoder_qwen3_vl\.py::test_any_size_of_another_dtype_and_family\[qwen3-vl"
    r"|test_selection_graph\.py::TestGolden::.*\[unrolled-(static-(qwen|llava)|dynamic).*_k(51|64|73|143|192)\]"
    r"|test_blocked\.py::test_golden_cases_at_any_bound\[.*_n(576|729|1024).*-one at a time"
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests; with several processes long tests begin, so that none is left with them in the end."""
    for item in items:
        if _is_served(item.nodeid):
            item.add_marker(pytest.mark.slow)
        if _EXHAUSTIVE.search(item.nodeid):
            item.add_marker(pytest.mark.exhaustive)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not (_is_served(item.nodeid) or item.get_closest_marker("slow")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Returns what gives tests that share a server to the same process."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByServer(config, log)


def _group(nodeid: str) -> str:
    """Returns the name that all tests have in common that one process runs: their servers' family, or their file."""
    path = nodeid.partition("::")[0]
    if _is_served(nodeid):
        # The longest: "qwen3-vl" is in "qwen3-vl-moe".
        return max((family for family in get_args(FamilyName) if family in nodeid), key=len, default=nodeid)
    return "pocket models" if Path(path).name in ("test_served.py", "test_recorded.py") else path


def _is_served(nodeid: str) -> bool:
    return Path(nodeid.partition("::")[0]).name.startswith("test_serving")
