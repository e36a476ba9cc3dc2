"""Every hook on SGLang's functions, the same ones in each server with a budget, whatever its model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mmtok_sglang.account import accounting, is_sent_once, remembered_by, token_counts
from mmtok_sglang.agent import refuse_chains
from mmtok_sglang.disaggregation import announcing, check_prefill_server
from mmtok_sglang.entry_points import answer_http, engine_async_generate, engine_generate, generate_request
from mmtok_sglang.flush import flushing
from mmtok_sglang.install import Hook, HookError
from mmtok_sglang.memory import reserving, room_for_keys_and_values
from mmtok_sglang.positions import bound_by_positions, decode_beams, embed_within_positions
from mmtok_sglang.request import add_chat_guidance, check_messages
from mmtok_sglang.server import Server
from mmtok_sglang.sessions import move_behind_turns, release_retracted_turn
from mmtok_sglang.start_errors import end_controller, end_main_process, ends_scheduler_start
from mmtok_sglang.transport import send_one_request

__all__ = ["hooks_of"]

_ENGINE_GENERATE = (
    "self prompt sampling_params input_ids image_data audio_data video_data mm_hashes mm_content_hashes "
    "return_logprob logprob_start_len top_logprobs_num token_ids_logprob lora_path custom_logit_processor "
    "require_reasoning return_hidden_states return_routed_experts routed_experts_start_len stream bootstrap_host "
    "bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank kv_hints data_parallel_rank "
    "external_trace_header rid session_params priority session_id cache_salt"
)


def hooks_of(server: Server) -> list[Hook]:
    """Returns the hooks of a process of a server; targets and parameters are those of sglang 0.5.23."""

    def init_request_dispatcher(original: Callable[..., None], scheduler: Any) -> None:
        runner = scheduler.tp_worker.model_runner
        on_command_line = scheduler.server_args.__dict__.get("_mmtok_on_command_line", False)
        with ends_scheduler_start(
            on_command_line, "--mmtok-backend" if server.settings.engine is None else "--mmtok-engine"
        ):
            if not isinstance(runner.model, server.family.model_class):
                raise HookError(f"SGLang made the model of {type(runner.model)}, expected {server.family.model_class}")
            server.selector.start_on(runner)
        server.invalidation.init_request_dispatcher(original, scheduler)

    def run_batch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        server.stages.settle()
        return server.failures.run_batch(original, *args, **kwargs)

    convert = partial(add_chat_guidance, server.settings)
    return [
        Hook(
            "entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request",
            "self request raw_request",
            convert if server.cutter.agent is None else refuse_chains(convert),
            reason="the last place that sees a chat's messages, by which each image has its question",
            until="processors are given the messages",
        ),
        Hook(
            "entrypoints.openai.serving_chat.OpenAIServingChat._process_messages",
            "self request is_multimodal output_constrained",
            partial(check_messages, server.settings),
            reason="/v1/chat/completions, /v1/messages and /v1/responses tokenise a text of any length in it",
            until="SGLang refuses a text before it tokenises it",
        ),
        Hook(
            "managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
            "self obj",
            server.cutter.tokenize_one_request,
            reason="every other entry point tokenises a text of any length in it",
            until="SGLang refuses a text before it tokenises it",
        ),
        Hook(
            "managers.tokenizer_manager.TokenizerManager._send_one_request",
            "self tokenized_obj",
            send_one_request,
            reason="it copies pixels into shared memory on the event loop",
            until="SGLang copies them in a thread, and has the time among its metrics",
        ),
        Hook(
            "managers.tokenizer_manager.TokenizerManager.generate_request",
            "self obj request",
            generate_request,
            reason="every entry point calls it, and not all hand mm_processor_kwargs on",
            until="/v1/messages, /v1/responses, /v1/decisions, /v1/rerank and sgl.Engine hand the field on",
        ),
        Hook(
            "utils.http_middleware_patch._PureASGIDispatch.__call__",
            "self scope receive send",
            answer_http,
            reason="our fields where SGLang takes no others end in HTTP 500, before a request is made of them",
            until="/vertex_generate answers HTTP 400 to a parameter that it does not know",
        ),
        Hook(
            "entrypoints.engine.Engine.generate",
            _ENGINE_GENERATE,
            engine_generate,
            reason="it takes no mm_processor_kwargs",
            until="it has this argument itself",
        ),
        Hook(
            "entrypoints.engine.Engine.async_generate",
            _ENGINE_GENERATE,
            engine_async_generate,
            reason="it takes no mm_processor_kwargs",
            until="it has this argument itself",
        ),
        Hook(
            "managers.schedule_batch.MultimodalInputs.from_processor_output",
            "obj requires_mm_token_modalities",
            server.keys.from_processor_output,
            reason="images get their identity in SGLang's caches here, after hashes that a caller may have given",
            until="items take a salt",
        ),
        Hook(
            "entrypoints.engine._wait_for_scheduler_ready",
            "scheduler_pipe_readers scheduler_procs",
            end_main_process,
            reason="the main process ends as a scheduler process did that ended with a message",
            until="SGLang ends without a traceback for an error that a plugin finds in the scheduler process",
        ),
        Hook(
            "managers.data_parallel_controller.DataParallelController.launch_tensor_parallel_group",
            "self server_args port_args base_gpu_id dp_rank worker_ports",
            end_controller,
            reason="with data parallelism it waits for the scheduler processes, whether they have ended or not",
            until="SGLang ends without a traceback for an error that a plugin finds in the scheduler process",
        ),
        Hook(
            "managers.scheduler.Scheduler.init_request_dispatcher",
            "self",
            init_request_dispatcher,
            reason="the model is loaded, so what runs the selection is made and may end the start; and requests that "
            "change weights or adapters are told of",
            until="plugins are called once the model is loaded, and caches know the version of the weights",
        ),
        Hook(
            "managers.scheduler.Scheduler._maybe_namespace_elastic_radix_cache",
            "self req",
            server.invalidation.namespace_prefix_cache,
            reason="every request goes through it before anything reads its extra_key",
            until="caches know the version of the weights",
        ),
        Hook(
            "managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
            "self",
            server.invalidation.pull_requests,
            reason="all ranks and stages get its result: which selections fell back goes with it",
            until="plugins may send requests",
        ),
        Hook(
            "mem_cache.kv_cache_configurator.mm_runtime_reservation_gb",
            "is_multimodal mm_feature_transport",
            reserving(server.settings.feature_cache_mb << 20, server.metrics),
            reason="the KV cache leaves room for features and selections",
            until="plugins may reserve memory",
        ),
        Hook(
            "mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
            "self pre_model_load_memory",
            partial(room_for_keys_and_values, server.settings.feature_cache_mb),
            reason="where that leaves nothing for the KV cache, its message names other flags",
            until="plugins may reserve memory",
        ),
        Hook(
            "managers.scheduler.Scheduler.flush_cache",
            "self empty_cache",
            flushing(server.cache, server.selector),
            reason="it answers /flush_cache and ends an update of the weights",
            until="plugins are told of a flush",
        ),
        Hook(
            "managers.scheduler.Scheduler.init_req_max_new_tokens",
            "self req",
            bound_by_positions,
            reason="every request goes through it once its images and, in a session, the turns before are known",
            until="SGLang bounds M-RoPE positions",
        ),
        Hook(
            "model_executor.forward_batch_info.ForwardBatch._compute_mrope_positions_decode",
            "self model_runner batch",
            decode_beams,
            reason="all beams of a request with images but the first get the positions of a text",
            until="SGLang knows the images of beams",
        ),
        Hook(
            "model_executor.forward_batch_info.ForwardBatch._compute_mrope_positions_extend",
            "self model_runner batch",
            server.positions.position_draft,
            reason="a draft model reads a prompt at the positions from before the selection",
            until="SGLang hands the model's positions to its draft model",
        ),
        Hook(
            "session.session_controller.SessionController.adjust_mm_offsets",
            "recv_req req image_inputs",
            move_behind_turns,
            reason="each pipeline stage moves the images of a session's later turn, and sends them on moved",
            until="SGLang moves them once",
        ),
        Hook(
            "session.streaming_session.StreamingSession.try_cache_finished_req",
            "self req",
            release_retracted_turn,
            reason="a retracted turn is taken for a finished one: it is answered wrongly, or the turn after it",
            until="SGLang waits for the end of a turn",
        ),
        Hook(
            "managers.schedule_batch.MultimodalInputs.compute_mm_token_counts",
            "self",
            token_counts,
            reason="usage counts a video's tokens without the text between its runs of placeholders",
            until="a span of placeholders may hold other tokens",
        ),
        Hook(
            "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
            "self req",
            accounting(remembered_by(server.selector)),
            reason="an answer says what was done with its images",
            until="requests report on their images",
        ),
        Hook(
            "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.is_request_level_customized_info_key",
            "self key",
            is_sent_once,
            reason="an account belongs to a request: as one value for each token, texts in the batch have nulls",
            until="requests report on their images",
        ),
        Hook(
            "managers.scheduler.Scheduler.handle_generate_request",
            "self recv_req mm_input_error",
            server.failures.take_in,
            reason="items get their keys and placeholders their values in it",
            until="SGLang survives an error there",
        ),
        Hook(
            "managers.scheduler.Scheduler.handle_embedding_request",
            "self recv_req mm_input_error",
            partial(embed_within_positions, server.failures.take_in),
            reason="as of requests that generate; and their positions are bounded nowhere else",
            until="SGLang survives an error there, and bounds M-RoPE positions",
        ),
        Hook(
            "disaggregation.common.conn.CommonKVManager.__init__",
            "self args disaggregation_mode server_args is_mla_backend",
            announcing(server.settings),
            reason="a prefill and a decode server with other settings would disagree about where a prompt ends",
            until="SGLang compares the lengths of a prompt on both servers",
        ),
        Hook(
            "disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",
            "self bootstrap_addr",
            check_prefill_server,
            reason="a decode server ends when it hears of a prefill server with other settings",
            until="SGLang refuses the requests of that server alone",
        ),
        Hook(
            "managers.scheduler.Scheduler.run_batch",
            "self batch pp_proxy_tensors",
            run_batch,
            reason="requests whose images failed in a batch end with it",
            until="SGLang survives an error of an embedding function",
        ),
    ]
