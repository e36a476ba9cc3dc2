// Runs an encoder that `mmtok export encoder` wrote, with ONNX Runtime on the CPU: an image and the embeddings of a
// question in, the kept tokens and their positions out.
//
//     encode_image ENCODER.onnx IMAGE.ppm TEXT.f32 TOKENS.f32
//
// TEXT.f32 is [M, D] and TOKENS.f32 [K, D], raw float32: the question's words from the language model's embedding table,
// and what takes the place of the image's tokens in its prompt. Printed are a line a kept token: its index in the image
// and, for a model with M-RoPE, its position (t, h, w) in the image's grid.

#include "pixels.h"

#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <onnxruntime_cxx_api.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace
{

//! The inputs' values, which ONNX Runtime reads where they are.
struct Inputs
{
    std::vector<float> pixels;
    std::vector<float> text;
    std::vector<Ort::Float16_t> halfText;
    std::vector<uint8_t> textMask;
    std::vector<uint8_t> excluded;
};

std::vector<float> readFloats(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    std::string const bytes{std::istreambuf_iterator<char>(file), {}};
    if (!file || bytes.empty() || bytes.size() % sizeof(float) != 0)
    {
        throw std::runtime_error(path + " is not a file of float32 numbers");
    }
    std::vector<float> values(bytes.size() / sizeof(float));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

template <typename Value>
Ort::Value tensorOf(std::vector<Value>& values, std::vector<int64_t> const& shape)
{
    auto const memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<Value>(memory, values.data(), values.size(), shape.data(), shape.size());
}

Ort::Value boolTensorOf(std::vector<uint8_t>& values, std::vector<int64_t> const& shape)
{
    auto const memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor(
        memory, values.data(), values.size(), shape.data(), shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL);
}

struct Input
{
    std::vector<int64_t> shape;
    ONNXTensorElementDataType type;
};

Input inputOf(Ort::Session const& session, std::string const& name)
{
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t idx = 0; idx < session.GetInputCount(); ++idx)
    {
        if (session.GetInputNameAllocated(idx, allocator).get() == name)
        {
            Ort::TypeInfo const type = session.GetInputTypeInfo(idx);
            auto const info = type.GetTensorTypeAndShapeInfo();
            return {info.GetShape(), info.GetElementType()};
        }
    }
    throw std::runtime_error("the graph has no input " + name + ": make it by `mmtok export encoder`");
}

bool hasOutput(Ort::Session const& session, std::string const& name)
{
    Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t idx = 0; idx < session.GetOutputCount(); ++idx)
    {
        if (session.GetOutputNameAllocated(idx, allocator).get() == name)
        {
            return true;
        }
    }
    return false;
}

std::vector<Ort::Value> run(Ort::Session& session, Inputs& inputs, std::vector<char const*> const& outputNames)
{
    Input const pixels = inputOf(session, "pixels");
    Input const text = inputOf(session, "text");
    Input const excluded = inputOf(session, "excluded");
    if (text.shape[0] != 1 || pixels.shape[0] < 0)
    {
        throw std::runtime_error(
            "the graph takes several images, or images of any size: export it for one of one size, "
            "with --batch-size 1 of a LLaVA, --image-size of a Qwen, or for the --tokens of one tile of InternVL3");
    }
    int64_t const width = text.shape[2];
    int64_t const numWords = static_cast<int64_t>(inputs.text.size()) / width;
    if (numWords * width != static_cast<int64_t>(inputs.text.size()))
    {
        throw std::runtime_error("the text's rows are " + std::to_string(width) + " wide in the graph");
    }
    inputs.textMask.assign(static_cast<std::size_t>(numWords), 1);
    inputs.excluded.assign(static_cast<std::size_t>(excluded.shape[1]), 0);

    std::vector<Ort::Value> values;
    values.push_back(tensorOf(inputs.pixels, pixels.shape));
    if (text.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
    {
        for (float const value : inputs.text)
        {
            inputs.halfText.emplace_back(value);
        }
        values.push_back(tensorOf(inputs.halfText, {1, numWords, width}));
    }
    else
    {
        values.push_back(tensorOf(inputs.text, {1, numWords, width}));
    }
    values.push_back(boolTensorOf(inputs.textMask, {1, numWords}));
    values.push_back(boolTensorOf(inputs.excluded, excluded.shape));
    std::vector<char const*> const names{"pixels", "text", "text_mask", "excluded"};
    return session.Run(
        Ort::RunOptions{nullptr}, names.data(), values.data(), names.size(), outputNames.data(), outputNames.size());
}

//! Writes the rows of the tokens that were kept, in float32.
void writeTokens(std::string const& path, Ort::Value const& tokens, std::size_t numKept)
{
    auto const info = tokens.GetTensorTypeAndShapeInfo();
    std::size_t const size = numKept * static_cast<std::size_t>(info.GetShape()[2]);
    std::vector<float> values(size);
    for (std::size_t idx = 0; idx < size; ++idx)
    {
        values[idx] = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
            ? tokens.GetTensorData<Ort::Float16_t>()[idx].ToFloat()
            : tokens.GetTensorData<float>()[idx];
    }
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<char const*>(values.data()), static_cast<std::streamsize>(size * sizeof(float)));
    if (!file)
    {
        throw std::runtime_error(path + " cannot be written");
    }
}

void encode(std::string const& encoder, std::string const& image, std::string const& text, std::string const& tokens)
{
    Processor const processor = readProcessor(encoder + ".processor_config.json");
    Inputs inputs;
    inputs.pixels = readPixels(image, processor);
    inputs.text = readFloats(text);

    Ort::Env env;
    Ort::Session session(env, encoder.c_str(), Ort::SessionOptions{});
    std::vector<char const*> names{"kept", "visual_tokens"};
    if (hasOutput(session, "positions"))
    {
        names.push_back("positions");
    }
    std::vector<Ort::Value> const outputs = run(session, inputs, names);

    std::size_t const budget = static_cast<std::size_t>(outputs[0].GetTensorTypeAndShapeInfo().GetShape()[1]);
    int64_t const* kept = outputs[0].GetTensorData<int64_t>();
    std::size_t numKept = 0;
    for (; numKept < budget && kept[numKept] >= 0; ++numKept)
    {
        std::cout << kept[numKept];
        for (std::size_t axis = 0; axis < 3 && outputs.size() > 2; ++axis)
        {
            std::cout << ' ' << outputs[2].GetTensorData<int64_t>()[axis * budget + numKept];
        }
        std::cout << '\n';
    }
    writeTokens(tokens, outputs[1], numKept);
}

} // namespace

int main(int argc, char** argv)
{
    if (argc != 5)
    {
        std::cerr << "usage: " << argv[0] << " ENCODER.onnx IMAGE.ppm TEXT.f32 TOKENS.f32\n";
        return 2;
    }
    try
    {
        encode(argv[1], argv[2], argv[3], argv[4]);
    }
    catch (std::exception const& error)
    {
        std::cerr << "encode_image: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
