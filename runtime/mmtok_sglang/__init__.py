"""The SGLang plugin: what happens to a request between HTTP and the language model.

1. `server_args` adds the flags; a server started with `--mmtok-budget` registers the classes of its model's family with
   SGLang and installs the `hooks`, all of it or nothing (`install`). `server` holds what a process needs, one of each.
2. `request` reads what a request asks for: its budget, and the text that guides the selection of each image, which an
   `agent` may add to.
   `limits` and `typed_placeholders` refuse what costs too much or would go wrong; `images` loads the images in threads,
   by `downloads` those that have an address, and `videos` opens the videos.
3. `processor`, over SGLang's class, has `placeholders` cut an image's N placeholder tokens to K in the tokenizer
   process: `request_checks` refuses what is no image, the `planner` leaves a `plan` on each image, with guidance by the
   `guidance_tokenizer`, and `cut` cuts. `repeated_patches` leaves out what looks like its neighbour. `pixels` sends
   8-bit values, which the encoder's device normalises.
4. `cache_key` makes the keys of all caches from everything that their values depend on; `invalidation` moves them on
   when weights change, or a selection was not made.
5. `model`, over SGLang's class, returns an image's kept tokens as its features, in the scheduler process;
   `feature_cache` has what they are chosen from, from the vision encoder or from before.
6. `selection` picks the K tokens, for all images of a prefill batch at once; `metrics` counts what it did.
7. `positions` gives the kept tokens their own M-RoPE positions back, and beams those of their request.
8. `account` says in the answer what was done with each image.
`entry_points` reads the per-request settings wherever a request may come in; `refusals` makes and counts the errors of
requests, `start_errors` ends a start that cannot succeed. `failures` ends the requests of an image for which a step
fails in the scheduler process, and no others. `memory` keeps room for features and selections beside the KV cache.
`stages` times what the tokenizer process does with images, the encoder and the language model.
`families` holds one file a model family; `cpu_platform` lets all of it run on a machine without a GPU.
"""
