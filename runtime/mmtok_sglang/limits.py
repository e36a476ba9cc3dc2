"""Limits of what one request may cost. Each is far from real use, and a flag moves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated

from mmtok_sglang.flags import Help
from mmtok_sglang.refusals import refusal

__all__ = ["Limits", "default_limits"]

# More bytes than text has for a token on average, in any language; runs of one letter have more.
_MAX_BYTES_A_TOKEN = 16
# Pixels that the images of one request may have together, in multiples of what one may have.
_MAX_LARGE = 8
# Pixels that the files of a request's videos may have in all of their frames, in the same multiples: of a file with one
# key frame, all before a frame that is read are decoded. By default 70 minutes of 1920 x 1080 at 30 frames a second.
_MAX_DECODED = 4096
# Guidance that the images of one request may have together, in multiples of what one may have.
_MAX_TEXTS = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is refused for (HTTP 400) before the server works on it.

    Args:
        max_images: The most images of a request. Without pruning the context bounds them; pruned, thousands of them fit
            into it, each of which is encoded whole.
        max_image_pixels: The most pixels of an image as it was sent, which decoding takes memory for; all images of a
            request may have eight times as many.
        max_video_frames: The most frames that the processor takes of the videos of a request. Together they may have
            eight times `max_image_pixels` as they were sent, and all frames of their files 4,096 times as many.
        max_video_pixels: The most pixels that the encoder reads of a video, of every second frame. The default lets
            through all that SGLang takes of one: 90 million.
        max_aspect_ratio: The most shorter sides that an image's longer side may have; CLIP's processor scales the
            shorter one up.
        max_guidance_tokens: The most tokens of the text that guides the selection of one image; all images of a request
            may have four times as many, the text of several images counted once. A text of more than 16 bytes for
            each of these tokens is refused before it is tokenised.
        max_selection_cost: K x N x (M + N) of N tokens, K kept ones and M guidance tokens, summed over the images of a
            request (LLaVA-NeXT: over their tiles). The selection computes at most as many gains.

    Raises:
        ValueError: A limit that would refuse everything.
    """

    max_images: Annotated[int, Help("a request of more images is refused (HTTP 400). Default: 256; 64 on a CPU.")] = 256
    max_image_pixels: Annotated[
        int,
        Help("""an image of more pixels is refused (HTTP 400) before it is decoded; all images of a request may have
        eight times as many. Default: 64,000,000; 4,194,304 for a Qwen on a CPU, where the encoder's attention takes
        memory by the square of the pixels."""),
    ] = 64_000_000
    max_video_frames: Annotated[
        int,
        Help("""a request of whose videos more frames would be read is refused (HTTP 400) before they are decoded.
        Default: 768; 64 on a CPU."""),
    ] = 768
    max_video_pixels: Annotated[
        int,
        Help("""a video is refused (HTTP 400) of which the encoder would read more pixels, those of every second frame
        counted. Default: 96,000,000; 4,194,304 for a Qwen on a CPU."""),
    ] = 96_000_000
    max_aspect_ratio: Annotated[
        float, Help("an image is refused whose longer side is more than this many shorter ones. Default: 200.")
    ] = 200.0
    max_guidance_tokens: Annotated[
        int,
        Help("""an image is refused whose selection is guided by more tokens of text; a request may bring four times as
        many for all its images. Default: 16384."""),
    ] = 16_384
    max_selection_cost: Annotated[
        float,
        Help("""a request is refused whose selections compute more gains: kept tokens x tokens x (guidance tokens +
        tokens), summed over its images. Default: 1e13, 2e11 on a CPU."""),
    ] = 1e13

    def __post_init__(self) -> None:
        for field in fields(self):
            # Not `< 1`, which is false of NaN.
            if not getattr(self, field.name) >= 1:
                raise ValueError(f"{field.name} is at least 1, got {getattr(self, field.name)}")

    def check_num_images(self, num_images: int) -> None:
        """Raises ValueError (HTTP 400) for too many images."""
        if num_images > self.max_images:
            raise refusal(
                "num_images",
                f"the request has {num_images:,} images, this server takes {self.max_images:,} (--mmtok-max-images): "
                "send fewer in a request",
            )

    def check_image(self, width: int, height: int) -> None:
        """Raises ValueError (HTTP 400) for an image that is too large or too long."""
        if width < 1 or height < 1:
            raise refusal("image", f"an image has {width} x {height} pixels: send one of at least 1 x 1")
        if width * height > self.max_image_pixels:
            raise refusal(
                "pixels",
                f"an image has {width} x {height} = {width * height:,} pixels, this server takes "
                f"{self.max_image_pixels:,} (--mmtok-max-image-pixels): send a smaller one",
            )
        longer, shorter = max(width, height), min(width, height)
        if longer > self.max_aspect_ratio * shorter:
            raise refusal(
                "aspect_ratio",
                f"an image has {width} x {height} pixels, one side {longer / shorter:,.0f} times the other; this "
                f"server takes {self.max_aspect_ratio:g} times (--mmtok-max-aspect-ratio): send it cut in parts",
            )

    def check_images(self, nums_pixels: Sequence[int]) -> None:
        """Raises ValueError (HTTP 400) for images that are too large together."""
        if sum(nums_pixels) > _MAX_LARGE * self.max_image_pixels:
            raise refusal(
                "pixels",
                f"the request's {len(nums_pixels)} images have {sum(nums_pixels):,} pixels, this server takes "
                f"{_MAX_LARGE * self.max_image_pixels:,} in a request, eight times --mmtok-max-image-pixels: send "
                "fewer or smaller ones",
            )

    def check_tiles(self, num_images: int, num_tiles: int, tile_pixels: int) -> None:
        """Raises ValueError (HTTP 400) for images that are too large together once they are cut into tiles.

        Args:
            num_images: Images of the request, however small: each is scaled up to its tiles.
            num_tiles: The most tiles of one.
            tile_pixels: Pixels of a tile.
        """
        most = _MAX_LARGE * self.max_image_pixels // tile_pixels
        if num_images * num_tiles > most:
            raise refusal(
                "pixels",
                f"the request's {num_images:,} images are cut into up to {num_tiles} tiles each, this server takes "
                f"{most:,} tiles in a request, the pixels of eight times --mmtok-max-image-pixels: send fewer images, "
                "or a smaller max_dynamic_patch",
            )

    def check_frames(self, sizes: Sequence[tuple[int, int, int, int]]) -> None:
        """Raises ValueError (HTTP 400) for videos of too many frames, or too large ones.

        Args:
            sizes: The frames that are read of each video of a request, those that its file has, their width and height
                as they were sent.
        """
        num_frames = sum(frames for frames, _, _, _ in sizes)
        if num_frames > self.max_video_frames:
            raise refusal(
                "video",
                f"{num_frames:,} frames would be read of this request's videos, this server takes "
                f"{self.max_video_frames:,} (--mmtok-max-video-frames): send a shorter video",
            )
        num_pixels = sum(frames * width * height for frames, _, width, height in sizes)
        if num_pixels > _MAX_LARGE * self.max_image_pixels:
            raise refusal(
                "pixels",
                f"the {num_frames:,} frames that would be read of this request's videos have {num_pixels:,} pixels, "
                f"this server takes {_MAX_LARGE * self.max_image_pixels:,}, eight times --mmtok-max-image-pixels: send "
                "a shorter or smaller video",
            )
        num_decoded = sum(frames * width * height for _, frames, width, height in sizes)
        if num_decoded > _MAX_DECODED * self.max_image_pixels:
            raise refusal(
                "pixels",
                f"the files of this request's videos have {num_decoded:,} pixels in all of their frames, this server "
                f"decodes {_MAX_DECODED * self.max_image_pixels:,}, {_MAX_DECODED:,} times --mmtok-max-image-pixels: "
                "send a shorter or smaller video, or one of fewer frames a second",
            )

    def check_encoded(self, num_pixels: int) -> None:
        """Raises ValueError (HTTP 400) for a video of which the encoder would read too many pixels."""
        if num_pixels > self.max_video_pixels:
            raise refusal(
                "pixels",
                f"the encoder would read {num_pixels:,} pixels of a video, this server takes {self.max_video_pixels:,} "
                "(--mmtok-max-video-pixels): send a shorter or smaller one",
            )

    def check_prompt(self, length: int, unit: str, max_prompt_tokens: int | None) -> None:
        """Raises ValueError (HTTP 400) for a prompt that is not worth tokenising: the server has none as long.

        Args:
            length: Letters of a text, or token ids, whose expanded placeholders may be cut later.
            unit: What is counted: characters, token ids.
            max_prompt_tokens: The tokens of the server's longest prompt, None where it is not known.
        """
        if max_prompt_tokens is not None and length > 2 * _MAX_BYTES_A_TOKEN * max_prompt_tokens:
            raise refusal(
                "guidance",
                f"the prompt has {length:,} {unit}, the longest prompt of this server {max_prompt_tokens:,} tokens: "
                "shorten it",
            )

    def check_texts(self, texts: Iterable[str]) -> None:
        """Raises ValueError (HTTP 400) for guidance that is too long to be tokenised, or cannot be.

        Args:
            texts: Each image's text.
        """
        most = _MAX_BYTES_A_TOKEN * self.max_guidance_tokens
        total = 0
        for text in dict.fromkeys(texts):
            # A text of more letters than that has more bytes, too: it is not encoded to count them.
            size = len(text) if len(text) > most else _num_bytes(text)
            total += size
            if size > most:
                raise refusal(
                    "guidance",
                    f"the text that guides the selection of an image has more than {most:,} bytes, 16 for each of the "
                    f"{self.max_guidance_tokens:,} tokens that this server takes (--mmtok-max-guidance-tokens): "
                    "shorten the question, or send mm_processor_kwargs.mmtok_guidance",
                )
            if total > _MAX_TEXTS * most:
                raise refusal(
                    "guidance",
                    f"the guidance of the images has more than {_MAX_TEXTS * most:,} bytes, 16 for each of the "
                    f"{_MAX_TEXTS * self.max_guidance_tokens:,} tokens that this server takes in a request, four times "
                    "--mmtok-max-guidance-tokens: shorten mm_processor_kwargs.mmtok_guidance",
                )

    def check_guidance(self, lengths: list[int]) -> None:
        """Raises ValueError (HTTP 400) for guidance of too many tokens.

        Args:
            lengths: Tokens of each distinct text of a request.
        """
        most = self.max_guidance_tokens
        if lengths and max(lengths) > most:
            raise refusal(
                "guidance",
                f"the text that guides the selection of an image has {max(lengths):,} tokens, this server takes "
                f"{most:,} (--mmtok-max-guidance-tokens): shorten the question, or send "
                "mm_processor_kwargs.mmtok_guidance",
            )
        if sum(lengths) > _MAX_TEXTS * most:
            raise refusal(
                "guidance",
                f"the guidance of the images has {sum(lengths):,} tokens, this server takes {_MAX_TEXTS * most:,} "
                "in a request, four times --mmtok-max-guidance-tokens: shorten mm_processor_kwargs.mmtok_guidance",
            )

    def check_cost(self, cost: int) -> None:
        """Raises ValueError (HTTP 400) for selections that take too long."""
        if cost > self.max_selection_cost:
            raise refusal(
                "selection_cost",
                f"selecting the tokens of this request's images costs {cost:.2g}, this server allows "
                f"{self.max_selection_cost:.2g} (--mmtok-max-selection-cost; kept tokens x tokens x (guidance tokens + "
                'tokens) of each image): ask for a smaller mmtok_budget, for "all", send smaller images, or for a '
                'video ask for mmtok_video_budget "frame"',
            )


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        # A Python caller may send it (HTTP does not let it in), and tokenizers take no such text.
        raise refusal(
            "guidance",
            f"the text that guides the selection of an image has half of a surrogate pair, {text[error.start]!r}, at "
            f"letter {error.start}: send whole characters",
        ) from None


def default_limits(device: str | None, max_pixels_on_cpu: int | None) -> Limits:
    """Returns the limits of a server that sets none.

    Args:
        device: SGLang's name of the server's device, None while it is not known.
        max_pixels_on_cpu: The most pixels of an image there, if the served model's family bounds them.
    """
    if device != "cpu":
        return Limits()
    # SGLang ends a server whose batch takes 300 s. A selection of 2,048 tokens from 8,192, which costs 1.4e11, took 7 s
    # (lazy, random features of width 3,584, 2 cores of an AMD EPYC with other work beside it, 2026-11-26).
    limits = Limits(max_images=64, max_video_frames=64, max_selection_cost=2e11)
    if max_pixels_on_cpu is None:
        return limits
    return replace(limits, max_image_pixels=max_pixels_on_cpu, max_video_pixels=max_pixels_on_cpu)
