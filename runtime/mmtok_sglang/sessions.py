"""Sessions: a request is a turn, which SGLang reads behind the turns before it.

A streaming session (`--enable-streaming-session`) has one turn at a time, and keeps its keys and values between turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.runtime_context import get_parallel

from mmtok_sglang.refusals import count_refusal

__all__ = [
    "holds_turns_before",
    "move_behind_turns",
    "refused_turn",
    "release_retracted_turn",
    "streaming_session_of",
]

_CUTS_AN_IMAGE = (
    "MMTok: the session's offset cuts off an image of an earlier turn, or a part of it: send an offset behind the "
    "image's tokens, or continue from the turn before the image by its rid"
)


def streaming_session_of(scheduler: Any, recv_req: Any) -> Any:
    """Returns the streaming session of a request that is not taken in yet, None if it has none."""
    params = getattr(recv_req, "session_params", None)  # a request for an embedding has none
    session = scheduler.session_controller.get(params.id) if params is not None else None
    return session if session is not None and session.streaming else None


def holds_turns_before(scheduler: Any, req: Any) -> bool:
    """Returns whether a request goes on with the keys and values that its streaming session holds."""
    if req.session is None or not req.session.streaming:
        return False
    holds: bool = scheduler.tree_cache.session.will_lend_record(req)
    return holds


def refused_turn(scheduler: Any, recv_req: Any) -> FINISH_ABORT | None:
    """Returns why a turn that is not taken in yet is refused (HTTP 400), None if it is not.

    That is a turn with images while the turn before is under way in a streaming session: SGLang 0.5.23 refuses it, too,
    and then looks for the places of its images in a prompt that it has put away. And a turn whose offset cuts off an
    image of a turn before, or a part of it: SGLang keeps that image (session/session_controller.py, `create_req`), and
    reads features of it that the prompt has no place for: an error, in a batch with other requests.
    """
    session = streaming_session_of(scheduler, recv_req)
    if session is not None and session._inflight and recv_req.mm_inputs is not None:
        return FINISH_ABORT("Streaming session already has an active request.", 400, "BadRequestError")
    if _cuts_an_image(scheduler, recv_req):
        count_refusal("placeholders")
        return FINISH_ABORT(_CUTS_AN_IMAGE, 400, "BadRequestError")
    return None


def move_behind_turns(original: Callable[..., None], recv_req: Any, req: Any, image_inputs: Any) -> None:
    """Moves the images of a session's later turn behind the turns before, on the first pipeline stage alone.

    It sends the request on with the images moved. Moved again on the next stage, they would lie behind the prompt: a
    request whose image failed would end on the first stage and run on the others, and they would wait for each other.
    """
    if get_parallel().pp_rank == 0:
        original(recv_req, req, image_inputs)


def release_retracted_turn(original: Callable[..., bool], sessions: Any, req: Any) -> bool:
    """Keeps what a finished turn leaves to its streaming session; a turn that is retracted leaves nothing.

    It is read again later, as any retracted request. SGLang 0.5.23 takes it for finished: it lets the next turn in, and
    has the last token read twice, which changes the states of linear attention; where the turn is retracted again, it
    is out of its session, and tokens behind the session's images get other M-RoPE positions.

    Returns:
        Whether the session keeps the turn's keys and values.
    """
    slot = sessions.borrowed_slot(req)
    if slot is None or req.finished():
        return original(sessions, req)
    # As SGLang does for a turn that is aborted: the caller releases both.
    del sessions.slots[req.session.session_id]
    req.lock, slot.lock = slot.lock, None
    return False


def _cuts_an_image(scheduler: Any, recv_req: Any) -> bool:
    params: Any = getattr(recv_req, "session_params", None)
    if params is None or not params.offset:
        return False
    session = scheduler.session_controller.get(params.id)
    node = session.req_nodes.get(params.rid) if session is not None else None
    if node is None or node.req.multimodal_inputs is None:
        return False
    answer = () if params.drop_previous_output else node.req.output_ids[: node.req.sampling_params.max_new_tokens]
    num_kept = len(range(len(node.req.origin_input_ids) + len(answer))[: params.offset])
    return any(end >= num_kept for item in node.req.multimodal_inputs.mm_items for _, end in item.offsets or ())
