// The CUDA calls of the pruner, on host memory: this machine needs neither CUDA nor a GPU.
#pragma once

#include <cstddef>
#include <cstring>

using cudaStream_t = void*;
enum cudaError_t
{
    cudaSuccess
};
enum cudaMemcpyKind
{
    cudaMemcpyDeviceToHost
};

inline cudaError_t cudaMemcpyAsync(void* target, void const* source, std::size_t size, cudaMemcpyKind, cudaStream_t)
{
    std::memcpy(target, source, size);
    return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return cudaSuccess;
}

inline char const* cudaGetErrorString(cudaError_t)
{
    return "";
}
