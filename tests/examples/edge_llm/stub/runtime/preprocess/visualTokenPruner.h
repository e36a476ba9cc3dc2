// The part of TensorRT-Edge-LLM's interface that the pruner uses, with the names and signatures of its
// cpp/runtime/preprocess/visualTokenPruner.h; memory is the host's, and a request's keep list is recorded.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace trt_edgellm::rt
{

class Tensor
{
public:
    Tensor(void* data, std::vector<int64_t> shape)
        : mData(data)
        , mShape(std::move(shape))
    {
    }
    void const* rawPointer() const
    {
        return mData;
    }
    std::vector<int64_t> const& getShape() const
    {
        return mShape;
    }

private:
    void* mData;
    std::vector<int64_t> mShape;
};

struct PipelineIO
{
    std::vector<int32_t> kept;
};

struct LLMEngineConfig
{
};

struct VisualPrunerConfig
{
};

struct ImageSpan
{
    int32_t begin{0};
    int32_t end{0};
    int32_t targetTokens{0};
};

struct PruneRequest
{
    Tensor const* embeds{nullptr};
    std::vector<int32_t> const* imagePositions{nullptr};
    std::vector<int32_t> const* textPositions{nullptr};
    std::vector<ImageSpan> const* imageSpans{nullptr};
    int32_t targetImageTokens{0};
    int32_t origLen{0};
};

class VisualTokenPruner
{
public:
    virtual ~VisualTokenPruner() = default;
    virtual char const* name() const noexcept = 0;
    int32_t run(PruneRequest const& request, PipelineIO& io)
    {
        return prune(request, io, nullptr);
    }

protected:
    VisualTokenPruner(VisualPrunerConfig const&, LLMEngineConfig const&) {}
    virtual int32_t prune(PruneRequest const& request, PipelineIO& io, cudaStream_t stream) = 0;
    int32_t compactToKeepList(
        PipelineIO& io, std::vector<int32_t> const& retained, PruneRequest const& request, cudaStream_t)
    {
        io.kept = retained;
        return request.origLen - static_cast<int32_t>(request.imagePositions->size() - retained.size());
    }
};

using VisualPrunerFactory
    = std::function<std::unique_ptr<VisualTokenPruner>(VisualPrunerConfig const&, LLMEngineConfig const&)>;

inline std::map<std::string, VisualPrunerFactory>& registry()
{
    static std::map<std::string, VisualPrunerFactory> factories;
    return factories;
}

inline void registerVisualPruner(std::string const& name, VisualPrunerFactory factory)
{
    registry()[name] = std::move(factory);
}

} // namespace trt_edgellm::rt
