// An image as an exported encoder takes it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

//! What FILE.onnx.processor_config.json says: mean and spread of a channel, for values from 0 to 1, and how the pixels
//! lie. Without patches they are [1, 3, height, width]; with patches a row each, those of a token one after another.
struct Processor
{
    int64_t width{0};
    int64_t height{0};
    std::vector<float> mean;
    std::vector<float> deviation;
    int64_t patchSize{0}; //!< 0 without patches
    int64_t temporalPatchSize{1};
    int64_t mergeSize{1};
};

//! \throws std::runtime_error The file is not there, or lacks a value.
Processor readProcessor(std::string const& path);

//! Returns the `pixels` of a binary PPM (P6, 8 bits a channel) of the processor's size.
//!
//! \throws std::runtime_error The file is not there, is no such PPM, or is of another size.
std::vector<float> readPixels(std::string const& path, Processor const& processor);
