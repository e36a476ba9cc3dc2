from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from mmtok_bench.serve.load import LoadError, LoadGenerator, read_load, write_chats

# The fields that are read of a line of `--output-file` with `--output-details`; times in seconds.
RESULT: dict[str, Any] = {
    "duration": 2.5,
    "errors": ["", "Bad Request: too long", ""],
    "ttfts": [0.1, 0.0, 0.3],
    "itls": [[0.01, 0.02], [], [0.03, 0.04]],
    "input_lens": [140, 60, 150],
    "output_lens": [3, 0, 3],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "result.jsonl"
    path.write_text("an older line\n" + json.dumps(RESULT | changes) + "\n")
    return path


def test_failed_requests_are_counted_and_not_timed(tmp_path: Path) -> None:
    load = read_load(written(tmp_path))
    assert load.ttfts_s == (0.1, 0.3)
    assert load.itls_s == ((0.01, 0.02), (0.03, 0.04))
    assert load.prompt_tokens == (140, 150)
    assert (load.output_tokens, load.duration_s) == (6, 2.5)
    assert load.answered == (0, 2)
    assert (load.num_failed, load.first_error) == (1, "Bad Request: too long")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": ["refused"] * 3}, "no request was answered; the first error: refused"),
        ({"ttfts": [0.1, 0.0, 0.0]}, "1 of 2 answers had no text"),
        ({"itls": None}, "is no result of SGLang"),
        ({"ttfts": [0.1]}, "is no result of SGLang"),
    ],
)
def test_what_was_not_answered_is_no_result(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read_load(written(tmp_path, **changes))


def test_a_file_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is no result"):
        read_load(tmp_path / "none.jsonl")


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadGenerator]:
    """A stand-in whose `cli_main` runs the program that it is given as an argument."""
    program = "import os, sys\n\nPROCESS = os.getpid()\n\ndef cli_main():\n    exec(sys.argv[1])\n"
    (tmp_path / "stand_in.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    before = set(psutil.Process().children(recursive=True))
    with LoadGenerator("stand_in") as made:
        yield made
    assert set(psutil.Process().children(recursive=True)) <= before


def test_one_import_serves_every_load(tmp_path: Path, generator: LoadGenerator) -> None:
    logs = [tmp_path / "logs" / f"{number}.log" for number in range(2)]
    for log in logs:
        generator.run(["print(PROCESS, os.getpid(), sys.stdin.read(), file=sys.stderr)"], log)
    (imported, first), (again, second) = (map(int, log.read_text().split()) for log in logs)
    assert imported == again
    assert len({imported, first, second}) == 3


def test_a_load_that_fails_shows_the_end_of_its_log_and_the_next_one_runs(
    tmp_path: Path, generator: LoadGenerator
) -> None:
    with pytest.raises(LoadError, match=r"failed \(exit status 1\)(.|\n)*no such data set$"):
        generator.run(["print('first', flush=True); sys.exit('no such data set')"], tmp_path / "it.log")
    with pytest.raises(LoadError, match=r"failed \(exit status 1\)(.|\n)*ZeroDivisionError"):
        generator.run(["1 / 0"], tmp_path / "it.log")
    generator.run(["print('answered')"], tmp_path / "it.log")
    assert (tmp_path / "it.log").read_text() == "answered\n"


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["timeout", "server"])
def test_a_load_that_hangs_is_ended_with_what_it_started(tmp_path: Path, generator: LoadGenerator, reason: str) -> None:
    # A duration that no other process sleeps for.
    duration = f"600.{os.getpid()}"
    is_started = tmp_path / "started"
    with pytest.raises(LoadError, match="was stopped: no server, or no time left"):
        generator.run(
            [f"open({str(is_started)!r}, 'w'); import subprocess; subprocess.run(['sleep', '{duration}'])"],
            tmp_path / "it.log",
            is_server_alive=lambda: reason != "server" or not is_started.exists(),
            timeout_s=5 if reason == "timeout" else 60,
        )
    assert is_started.exists()
    assert not any(duration in (each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))
    generator.run(["print('answered')"], tmp_path / "it.log")


def test_a_load_generator_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    with LoadGenerator("no_such_module") as broken, pytest.raises(LoadError, match="No module named 'no_such_module'"):
        broken.run([], tmp_path / "it.log")


@pytest.mark.slow
def test_the_load_generator_takes_its_arguments(tmp_path: Path) -> None:
    with LoadGenerator() as generator, pytest.raises(LoadError, match=r"failed \(exit status 2\)(.|\n)*--no-such-flag"):
        generator.run(["--no-such-flag"], tmp_path / "it.log")


def images(path: Path) -> list[Image.Image]:
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    urls = [chat[0]["content"][0]["image_url"]["url"] for chat in chats]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_every_chat_is_about_another_photograph_of_the_size_that_is_sent(tmp_path: Path) -> None:
    seeds = [f"it {number}" for number in range(12)]
    asked = [(seed, ("One?", "Two?")[number % 2]) for number, seed in enumerate(seeds)]
    write_chats(tmp_path / "chats" / "it.jsonl", "photograph", (224, 168), (112, 84), asked)
    sent = images(tmp_path / "chats" / "it.jsonl")
    assert {image.size for image in sent} == {(112, 84)}
    assert len({image.tobytes() for image in sent}) == len(seeds)
    chats = [json.loads(line)["messages"] for line in (tmp_path / "chats" / "it.jsonl").read_text().splitlines()]
    assert [chat[0]["content"][1]["text"] for chat in chats] == ["One?", "Two?"] * 6
