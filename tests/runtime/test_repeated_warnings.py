from __future__ import annotations

import logging

import pytest

from mmtok_sglang.repeated_warnings import RepeatedWarning


def test_a_few_lines_an_interval_and_a_count_of_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [100.0]
    warning = RepeatedWarning(logging.getLogger("test"), num_lines=2, interval_s=60, now_s=lambda: now_s[0])
    for image in range(1000):
        warning.log("image %d failed", image)
    assert [record.getMessage() for record in caplog.records] == ["image 0 failed", "image 1 failed"]
    now_s[0] = 159.9
    warning.log("image %d failed", 1000)
    assert len(caplog.records) == 2
    now_s[0] = 160.0
    warning.log("image %d failed", 1001)
    warning.log("image %d failed", 1002)
    warning.log("image %d failed", 1003)
    assert [record.getMessage() for record in caplog.records[2:]] == [
        "image 1001 failed (999 such warnings before this one were left out)",
        "image 1002 failed",
    ]


def test_kinds_do_not_hide_each_other(caplog: pytest.LogCaptureFixture) -> None:
    frequent, rare = (RepeatedWarning(logging.getLogger("test"), num_lines=1) for _ in range(2))
    for _ in range(10):
        frequent.log("frequent")
    rare.log("rare")
    assert [record.getMessage() for record in caplog.records] == ["frequent", "rare"]
