"""Cutting what a processed prompt holds for each planned image to the tokens that its plan keeps."""

from __future__ import annotations

from typing import Any

import torch

from mmtok_sglang.plan import KEY, plan_of

__all__ = ["cut_placeholders"]


def cut_placeholders(output: Any) -> None:
    """Cuts the placeholders of every planned image in place, with all that is laid out by token.

    Text tokens, and decoding after them, keep the M-RoPE positions they have without pruning; the K placeholders that
    stay hold the place of tokens that are not chosen yet, so the N original positions go into the plan. The runs of a
    video become one span, with the text between them: its first K placeholders stay, and all of the text.
    """
    input_ids = torch.as_tensor(output.input_ids)
    stays = torch.ones(len(input_ids), dtype=torch.bool)
    for item in output.mm_items:
        plan = plan_of(item)
        if plan is None:
            continue
        runs = torch.cat([torch.arange(first, last + 1) for first, last in item.offsets])
        stays[runs[plan.num_kept :]] = False
        start, end = item.offsets[0][0], item.offsets[-1][1]
        item.offsets = [(start, end)]
        if output.mrope_positions is not None:
            positions = output.mrope_positions[:, start : end + 1]
            item.model_specific_data[KEY]["positions"] = (
                positions.clone() if plan.encoded is None else positions[:, plan.encoded]
            )
    if stays.all():
        return
    # The new index of a token is the number of tokens that stay up to it, less one: right for first and last of each
    # span, since a cut span's last old index maps to its last token that stays.
    new_index = stays.cumsum(0) - 1
    for item in output.mm_items:
        item.offsets = [(int(new_index[start]), int(new_index[end])) for start, end in item.offsets]
    output.input_ids = input_ids[stays].tolist()
    output.padded_input_ids = None
    if output.token_type_ids is not None:
        output.token_type_ids = torch.as_tensor(output.token_type_ids).flatten()[stays]
    if output.mrope_positions is not None:
        output.mrope_positions = output.mrope_positions[:, stays].contiguous()
        output.mrope_position_delta = output.mrope_position_delta + int((~stays).sum())
