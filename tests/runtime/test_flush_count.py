from __future__ import annotations

import subprocess
import sys

import pytest

from mmtok_sglang.flush_count import FlushCount, make_flush_count


def in_another_process(code: str) -> str:
    code = f"from mmtok_sglang.flush_count import FlushCount, make_flush_count\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_all_processes_raise_one_number() -> None:
    path = make_flush_count()
    here, there = FlushCount(path), FlushCount(path)
    assert (int(here), int(there)) == (0, 0)
    here.add()
    there.add()
    assert in_another_process(f"count = FlushCount({path!r})\ncount.add()\nprint(int(count))") == "3"
    assert (int(here), int(there)) == (3, 3)


def test_two_servers_have_two() -> None:
    one, other = FlushCount(make_flush_count()), FlushCount(make_flush_count())
    one.add()
    assert (int(one), int(other)) == (1, 0)


def test_the_number_ends_with_its_process() -> None:
    path = in_another_process("print(make_flush_count())")
    FlushCount(path).add()
    with pytest.raises(FileNotFoundError):
        int(FlushCount(path))
