from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Modality, MultimodalInputs

from mmtok_sglang.account import accounting, image_account, token_counts
from mmtok_sglang.plan import ImagePlan
from mmtok_sglang.selection import Outcome
from tests.runtime.stand_ins import image_item

PRUNED = image_item((3, 12), ImagePlan(num_tokens=100, num_kept=10, guidance=[5]))
DRAWN = image_item((20, 24), ImagePlan(num_tokens=50, num_kept=5, guidance=[], method="random", seed=3))
WHOLE = image_item((30, 37))
OUTCOMES = {id(PRUNED): Outcome("mmtok", coverage=0.75, coverage_bound=0.8)}


def outcome_of(item: Any) -> Any:
    return OUTCOMES.get(id(item))


def a_request(*items: Any, output_ids: tuple[int, ...] = (7,), customized_info: Any = None) -> Any:
    inputs = SimpleNamespace(mm_items=list(items)) if items else None
    return SimpleNamespace(
        multimodal_inputs=inputs, output_ids=output_ids, customized_info=customized_info, finished_len=None
    )


def output(request: Any, outcomes: Any = outcome_of) -> Any:
    """Returns what a request has for its answer's metadata when SGLang sends its tokens."""
    seen = []
    accounting(outcomes)(lambda accumulator, *, req: seen.append(req.customized_info), "acc", req=request)
    assert len(seen) == 1
    return seen[0]


def test_the_account_of_images() -> None:
    account = image_account([PRUNED, WHOLE], outcome_of)
    assert json.loads(json.dumps(account)) == {
        "image_tokens_in": 108,
        "image_tokens_kept": 18,
        "num_fallbacks": 0,
        "images": [
            {
                "tokens_in": 100,
                "tokens_encoded": 100,
                "tokens_kept": 10,
                "method": "mmtok",
                "coverage": 0.75,
                "coverage_bound": 0.8,
                "is_fallback": False,
                "auto": None,
            },
            {
                "tokens_in": 8,
                "tokens_encoded": 8,
                "tokens_kept": 8,
                "method": None,
                "coverage": None,
                "coverage_bound": None,
                "is_fallback": False,
                "auto": None,
            },
        ],
        "video_tokens_in": 0,
        "video_tokens_kept": 0,
        "videos": [],
    }


def test_videos_are_told_apart_from_images() -> None:
    film = image_item((20, 29), ImagePlan(100, 10, guidance=[]))
    film.modality = Modality.VIDEO
    account = image_account([WHOLE, film], lambda _: None)
    assert (account["image_tokens_in"], len(account["images"])) == (8, 1)
    assert (account["video_tokens_in"], account["video_tokens_kept"], len(account["videos"])) == (100, 10, 1)
    assert account["num_fallbacks"] is None


def test_text_between_the_runs_of_a_video_is_counted_as_text() -> None:
    plan = ImagePlan(12, 5, [], num_frames=3, between=[[1, 2], [3, 4]])
    video = image_item((3, 11), plan)
    video.modality = Modality.VIDEO
    inputs = MultimodalInputs(mm_items=[image_item((0, 1)), video])
    assert MultimodalInputs.compute_mm_token_counts(inputs) == (2, 0, 9)
    assert token_counts(MultimodalInputs.compute_mm_token_counts, inputs) == (2, 0, 5)


def test_counts_of_tokens_end_no_scheduler(caplog: pytest.LogCaptureFixture) -> None:
    item = image_item((0, 1))
    item.model_specific_data["mmtok"] = {"no": "plan"}
    inputs = MultimodalInputs(mm_items=[item])
    assert token_counts(MultimodalInputs.compute_mm_token_counts, inputs) == (2, 0, 0)
    assert "usage counts a video's timestamps" in caplog.text


def test_a_fallback_is_told() -> None:
    outcomes: dict[int, Any] = {id(PRUNED): Outcome("mmtok", "its features are not finite")}
    account = image_account([PRUNED, WHOLE], lambda item: outcomes[id(item)])
    assert (account["num_fallbacks"], account["images"][0]["is_fallback"]) == (1, True)


def test_what_is_not_known_is_null() -> None:
    account = image_account([PRUNED, DRAWN], outcome_of)
    assert (account["image_tokens_in"], account["image_tokens_kept"], account["num_fallbacks"]) == (150, 15, None)
    assert account["images"][1] == {
        "tokens_in": 50,
        "tokens_encoded": 50,
        "tokens_kept": 5,
        "method": "random",
        "coverage": None,
        "coverage_bound": None,
        "is_fallback": None,
        "auto": None,
    }


def test_why_a_budget_was_chosen_is_told() -> None:
    auto = {"asks": "count", "share": "25%"}
    item = image_item((3, 12), ImagePlan(num_tokens=40, num_kept=10, guidance=[5], auto=auto))
    assert image_account([item], outcome_of)["images"][0]["auto"] == auto


def test_the_account_goes_with_the_first_token() -> None:
    request = a_request(PRUNED, output_ids=())
    assert output(request) is None
    request.output_ids = (7,)
    first = output(request)
    assert first == {"mmtok": [image_account([PRUNED], outcome_of)]}
    request.output_ids = (7, 8)
    assert output(request, lambda item: pytest.fail("the account is made once")) == first


def test_a_request_without_images_has_no_account() -> None:
    assert output(a_request()) is None


def test_what_the_model_reports_stays() -> None:
    assert output(a_request(WHOLE, customized_info={"entropy": [1.0]}))["entropy"] == [1.0]


def test_an_error_costs_the_account_and_not_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    def broken(item: Any) -> Any:
        raise KeyError(item)

    accept = accounting(broken)
    for _ in range(2):
        sent: list[Any] = []
        accept(lambda _, *, req, sent=sent: sent.append(req.customized_info), "acc", req=a_request(PRUNED))
        assert sent == [None]
    assert caplog.messages == ["MMTok: answers do not say what was done with their images"]
