// The pruner and its selection as functions that Python can call; a negative result is an error, said in `error`.
#include "mmtok_pruner.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>

namespace
{

template <typename Call>
int32_t guarded(char* error, Call call)
{
    try
    {
        return call();
    }
    catch (std::exception const& exception)
    {
        std::snprintf(error, 256, "%s", exception.what());
        return -1;
    }
}

mmtok::Config configOf(float const* constants, int32_t coverage)
{
    return {constants[0], constants[1], constants[2], static_cast<mmtok::Coverage>(coverage)};
}

} // namespace

extern "C" int32_t selectTokens(float const* vision, float const* keys, float const* text, uint8_t const* excluded,
    int64_t const* sizes, float const* constants, int32_t coverage, int32_t* order, int32_t* kept, float* curve,
    float* total, char* error)
{
    auto const size = [&](int idx) { return static_cast<std::size_t>(sizes[idx]); };
    return guarded(error, [&] {
        std::vector<uint8_t> const barred(excluded, excluded + size(6));
        mmtok::Selection const found = mmtok::selectTokens({vision, size(0), size(1)}, {keys, size(2), size(3)},
            {text, size(4), size(1)}, size(5), configOf(constants, coverage), barred);
        std::copy(found.order.begin(), found.order.end(), order);
        std::copy(found.kept.begin(), found.kept.end(), kept);
        std::copy(found.coverage.begin(), found.coverage.end(), curve);
        *total = found.total;
        return static_cast<int32_t>(found.order.size());
    });
}

// `keys` null registers none; `spans` are begin, end, tokens to keep of each image.
extern "C" int32_t prune(void* embeddings, int64_t length, int64_t width, int32_t const* spans, int64_t numSpans,
    float const* keys, int64_t keysWidth, float const* constants, int32_t coverage, int32_t* kept, char* error)
{
    namespace rt = trt_edgellm::rt;
    return guarded(error, [&] {
        mmtok::edge_llm::PrunerOptions options;
        options.config = configOf(constants, coverage);
        if (keys != nullptr)
        {
            options.keys = [=](rt::PruneRequest const& request, std::size_t imageIdx, cudaStream_t) {
                float const* first = keys;
                for (std::size_t before = 0; before < imageIdx; ++before)
                {
                    rt::ImageSpan const& span = (*request.imageSpans)[before];
                    first += (span.end - span.begin) * keysWidth;
                }
                rt::ImageSpan const& span = (*request.imageSpans)[imageIdx];
                float const* last = first + (span.end - span.begin) * keysWidth;
                return mmtok::edge_llm::Keys{{first, last}, static_cast<std::size_t>(keysWidth)};
            };
        }
        mmtok::edge_llm::registerPruner(options);
        auto const pruner = rt::registry().at("mmtok")({}, {});
        rt::Tensor const tensor(embeddings, {length, width});
        std::vector<rt::ImageSpan> images;
        std::vector<int32_t> visual;
        for (int64_t idx = 0; idx < numSpans; ++idx)
        {
            images.push_back({spans[3 * idx], spans[3 * idx + 1], spans[3 * idx + 2]});
            for (int32_t position = images.back().begin; position < images.back().end; ++position)
            {
                visual.push_back(position);
            }
        }
        rt::PruneRequest request;
        request.embeds = &tensor;
        request.imagePositions = &visual;
        request.imageSpans = &images;
        request.origLen = static_cast<int32_t>(length);
        rt::PipelineIO io;
        int32_t const newLength = pruner->run(request, io);
        std::copy(io.kept.begin(), io.kept.end(), kept);
        return newLength;
    });
}
