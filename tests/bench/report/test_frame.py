from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmtok_bench.report.document import make_report
from mmtok_bench.report.frame import frame_of, is_cpu, newest, read_results
from tests.bench.report.rows import CPU, GPU, selector_rows, write


def test_files_and_folders_are_read_once_each(tmp_path: Path) -> None:
    file = write(tmp_path / "a" / "b.jsonl", selector_rows())
    assert len(read_results([file, tmp_path, tmp_path / "a" / ".." / "a" / "b.jsonl"])[0]) == len(selector_rows())


def test_a_row_cut_off_is_told_and_the_others_count(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", selector_rows())
    with file.open("a") as end:
        end.write('{"bench": "sel')
    frame, notes = read_results([file])
    assert list(frame["metrics"]) == [each.metrics for each in selector_rows()]
    assert notes == [f"{file}:{len(selector_rows()) + 1} was cut off and is skipped"]


def test_machines_gpus_first(tmp_path: Path) -> None:
    rows = selector_rows(CPU)[:1] + [replace(each, num_threads=1) for each in selector_rows(CPU)[:1]]
    rows += selector_rows(GPU)[:1] + [replace(each, num_threads=9) for each in selector_rows(GPU)[:1]]
    frame, _ = read_results([write(tmp_path / "rows.jsonl", rows)])
    assert frame["machine"].value_counts().to_dict() == {
        "Made-up GPU": 2,
        "Made-up CPU, 2 cores, 2 threads": 1,
        "Made-up CPU, 2 cores, 1 thread": 1,
    }
    chapters = [chapter.title for chapter in make_report(frame).chapters]
    assert [is_cpu(machine) for machine in chapters] == [False, True, True]


def test_names_of_graphics_cards_are_no_cpus() -> None:
    assert not is_cpu("NVIDIA H200")
    assert is_cpu("AMD EPYC 9555 64-Core Processor, 2 cores")


def test_the_newest_row_of_a_case_counts() -> None:
    first = selector_rows()[0]
    later = replace(first, time="2026-11-21T11:00:00+00:00", num_runs=7)
    other = replace(first, backend="triton")
    for rows in ([first, later, other], [later, other, first]):
        found = newest(frame_of(rows))
        assert dict(zip(found["backend"], found["num_runs"], strict=True)) == {
            first.backend: 7,
            "triton": first.num_runs,
        }


def test_what_lies_in_a_runs_own_folder_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "serve" / "serve-1.jsonl", selector_rows())
    load = tmp_path / "serve" / "serve-1" / "load" / "off.jsonl"
    load.parent.mkdir(parents=True)
    load.write_text('{"backend": "sglang-oai", "completed": 8}\n')
    write(tmp_path / "serve" / "kept" / "serve-0.jsonl", selector_rows(GPU))
    frame, notes = read_results([tmp_path])
    assert set(frame["device"]) == {CPU, GPU}
    assert notes == []
    with pytest.raises(ValueError, match=r"off\.jsonl:1 is no result row"):
        read_results([tmp_path, load])


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no \.jsonl file in "):
        read_results([tmp_path])
    with pytest.raises(ValueError, match="nowhere does not exist; expected a file of result rows, or a folder"):
        read_results([tmp_path / "nowhere"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"there is no row in .*the measuring was ended before its first"):
        read_results([tmp_path])
