#include "mmtok_pruner.h"

#include <cstring>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <utility>

namespace mmtok::edge_llm
{
namespace
{

namespace rt = trt_edgellm::rt;

void requireCuda(cudaError_t status, char const* what)
{
    if (status != cudaSuccess)
    {
        throw std::runtime_error(std::string("mmtok: ") + what + " failed: " + cudaGetErrorString(status));
    }
}

//! Returns the value of a half-precision number, which the host's compiler need not know.
float floatOfHalf(uint16_t half)
{
    uint32_t const sign = static_cast<uint32_t>(half & 0x8000U) << 16U;
    uint32_t exponent = (half >> 10U) & 0x1FU;
    uint32_t mantissa = half & 0x3FFU;
    if (exponent == 0 && mantissa != 0)
    {
        // Subnormal: shifted until its leading bit is the hidden one.
        exponent = 1;
        while ((mantissa & 0x400U) == 0)
        {
            mantissa <<= 1U;
            --exponent;
        }
        mantissa &= 0x3FFU;
        exponent += 112U;
    }
    else if (exponent == 0x1FU)
    {
        exponent = 0xFFU;
    }
    else if (exponent != 0)
    {
        exponent += 112U;
    }
    uint32_t const bits = sign | exponent << 23U | mantissa << 13U;
    float value = 0.0F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

//! Returns the request's embeddings [origLen, width] on the host, when all that was enqueued before is done.
std::vector<float> hostEmbeddings(rt::PruneRequest const& request, std::size_t width, cudaStream_t stream)
{
    std::vector<uint16_t> halves(static_cast<std::size_t>(request.origLen) * width);
    requireCuda(cudaMemcpyAsync(halves.data(), request.embeds->rawPointer(), halves.size() * sizeof(uint16_t),
                    cudaMemcpyDeviceToHost, stream),
        "copying the embeddings");
    requireCuda(cudaStreamSynchronize(stream), "waiting for the embeddings");
    std::vector<float> values(halves.size());
    for (std::size_t idx = 0; idx < halves.size(); ++idx)
    {
        values[idx] = floatOfHalf(halves[idx]);
    }
    return values;
}

class Pruner final : public rt::VisualTokenPruner
{
public:
    Pruner(rt::VisualPrunerConfig const& config, rt::LLMEngineConfig const& engineConfig, PrunerOptions options,
        std::string name)
        : rt::VisualTokenPruner(config, engineConfig)
        , mOptions(std::move(options))
        , mName(std::move(name))
    {
    }

    char const* name() const noexcept override
    {
        return mName.c_str();
    }

protected:
    int32_t prune(rt::PruneRequest const& request, rt::PipelineIO& io, cudaStream_t stream) override
    {
        std::size_t const width = static_cast<std::size_t>(request.embeds->getShape()[1]);
        std::vector<float> const embeddings = hostEmbeddings(request, width, stream);
        Rows const question = questionOf(request, embeddings, width);
        if (question.count == 0 && mOptions.config.coverage == Coverage::kText)
        {
            std::cerr << "mmtok: the prompt has no question, which coverage of the text needs: its tokens are all kept\n";
            return request.origLen;
        }
        std::vector<int32_t> kept;
        for (std::size_t imageIdx = 0; imageIdx < request.imageSpans->size(); ++imageIdx)
        {
            rt::ImageSpan const& span = (*request.imageSpans)[imageIdx];
            std::size_t const numTokens = static_cast<std::size_t>(span.end - span.begin);
            Rows const vision{embeddings.data() + static_cast<std::size_t>(span.begin) * width, numTokens, width};
            Keys const keys = mOptions.keys ? mOptions.keys(request, imageIdx, stream) : Keys{};
            Rows const keyRows{keys.values.data(), keys.width > 0 ? keys.values.size() / keys.width : 0, keys.width};
            Selection const selection = selectTokens(
                vision, keyRows, question, static_cast<std::size_t>(span.targetTokens), mOptions.config);
            for (int32_t const token : selection.kept)
            {
                kept.push_back(span.begin + token);
            }
        }
        return compactToKeepList(io, kept, request, stream);
    }

private:
    //! Returns the prompt's rows after the last image, without the chat template's own.
    Rows questionOf(rt::PruneRequest const& request, std::vector<float> const& embeddings, std::size_t width) const
    {
        int32_t const begin = request.imageSpans->back().end + mOptions.numTokensBeforeQuestion;
        int32_t const end = request.origLen - mOptions.numTokensAfterQuestion;
        if (begin >= end)
        {
            return {nullptr, 0, width};
        }
        return {embeddings.data() + static_cast<std::size_t>(begin) * width, static_cast<std::size_t>(end - begin), width};
    }

    PrunerOptions mOptions;
    std::string mName;
};

} // namespace

void registerPruner(PrunerOptions options, std::string const& name)
{
    if (!options.keys && options.config.coverage != Coverage::kText)
    {
        throw std::invalid_argument(
            "mmtok: covering the image needs the features before the projector: set PrunerOptions::keys, or "
            "config.coverage to Coverage::kText");
    }
    rt::registerVisualPruner(
        name, [options, name](rt::VisualPrunerConfig const& config, rt::LLMEngineConfig const& engineConfig) {
            return std::unique_ptr<rt::VisualTokenPruner>(
                std::make_unique<Pruner>(config, engineConfig, options, name));
        });
}

} // namespace mmtok::edge_llm
