// The selection as a visual-token pruner of NVIDIA's TensorRT-Edge-LLM: README.md says how to build it.
#pragma once

#include "mmtok_selection.h"
#include "runtime/preprocess/visualTokenPruner.h"

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <functional>
#include <string>
#include <vector>

namespace mmtok::edge_llm
{

//! Features of one image before the projector, in host memory: row-major [tokens, width], in raster order. For a Qwen a
//! token's row is the mean over the patches that make it.
struct Keys
{
    std::vector<float> values;
    std::size_t width{0};
};

//! Returns the keys of an image of the request that is pruned; images are counted from 0 within the request.
using KeysSource = std::function<Keys(
    trt_edgellm::rt::PruneRequest const& request, std::size_t imageIdx, cudaStream_t stream)>;

struct PrunerOptions
{
    Config config;
    //! Prompt tokens between the last image and the question, and after the question; the defaults are those of the
    //! Qwens' chat template (<|vision_end|>; <|im_end|> \n <|im_start|> assistant \n).
    int32_t numTokensBeforeQuestion{1};
    int32_t numTokensAfterQuestion{5};
    //! Not needed where config.coverage is kText. Edge-LLM's visual runner has no such features: its visual engine and
    //! runner must give them as well.
    KeysSource keys;
};

//! Registers the selection under `name`; call it before the runtime is made. Each image keeps the number of tokens that
//! Edge-LLM's reduction ratio gives it.
//!
//! \throws std::invalid_argument Without a source of keys where the coverage needs them.
void registerPruner(PrunerOptions options, std::string const& name = "mmtok");

} // namespace mmtok::edge_llm
