#include "pixels.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace
{

constexpr int64_t kNumChannels = 3;

std::string readFile(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    if (!file)
    {
        throw std::runtime_error(path + " cannot be read");
    }
    return {std::istreambuf_iterator<char>(file), {}};
}

//! Returns the numbers after `"name":` in JSON whose names are unique; none where it has no such name.
std::vector<double> numbersOf(std::string const& json, std::string const& name)
{
    std::vector<double> numbers;
    std::size_t const found = json.find('"' + name + '"');
    if (found == std::string::npos)
    {
        return numbers;
    }
    char const* place = json.c_str() + json.find(':', found) + 1;
    while (*place == ' ' || *place == '\n' || *place == '[' || *place == ',')
    {
        char* end = nullptr;
        double const number = std::strtod(++place, &end);
        if (end != place)
        {
            numbers.push_back(number);
            place = end;
        }
    }
    return numbers;
}

double numberOf(std::string const& path, std::string const& json, std::string const& name)
{
    std::vector<double> const numbers = numbersOf(json, name);
    if (numbers.empty())
    {
        throw std::runtime_error(path + " has no number " + name);
    }
    return numbers.front();
}

std::vector<float> channelsOf(std::string const& path, std::string const& json, std::string const& name)
{
    std::vector<double> const numbers = numbersOf(json, name);
    if (numbers.size() != kNumChannels)
    {
        throw std::runtime_error(path + " has no three numbers " + name);
    }
    return {numbers.begin(), numbers.end()};
}

//! Rows of red, green and blue, 8 bits each.
struct Image
{
    int64_t width{0};
    int64_t height{0};
    std::string rgb;
};

Image readImage(std::string const& path)
{
    std::string const content = readFile(path);
    std::istringstream header(content);
    std::string magic;
    int64_t largest = 0;
    Image image;
    header >> magic >> image.width >> image.height >> largest;
    int64_t const size = image.width * image.height * kNumChannels;
    if (!header || magic != "P6" || largest != 255 || size <= 0
        || static_cast<int64_t>(content.size()) != static_cast<int64_t>(header.tellg()) + 1 + size)
    {
        throw std::runtime_error(path + " is not a binary PPM (P6) of 8 bits a channel without comments");
    }
    image.rgb = content.substr(content.size() - static_cast<std::size_t>(size));
    return image;
}

//! Appends a channel's normalised values in a rectangle of the image.
void addBlock(std::vector<float>& pixels, Image const& image, Processor const& processor, int64_t channel,
    int64_t firstRow, int64_t firstColumn, int64_t numRows, int64_t numColumns)
{
    for (int64_t row = firstRow; row < firstRow + numRows; ++row)
    {
        for (int64_t column = firstColumn; column < firstColumn + numColumns; ++column)
        {
            auto const byte = static_cast<uint8_t>(image.rgb[(row * image.width + column) * kNumChannels + channel]);
            float const value = static_cast<float>(byte) / 255.0F;
            pixels.push_back((value - processor.mean[channel]) / processor.deviation[channel]);
        }
    }
}

} // namespace

Processor readProcessor(std::string const& path)
{
    std::string const json = readFile(path);
    Processor processor;
    processor.width = static_cast<int64_t>(numberOf(path, json, "width"));
    processor.height = static_cast<int64_t>(numberOf(path, json, "height"));
    processor.mean = channelsOf(path, json, "image_mean");
    processor.deviation = channelsOf(path, json, "image_std");
    if (!numbersOf(json, "patch_size").empty())
    {
        processor.patchSize = static_cast<int64_t>(numberOf(path, json, "patch_size"));
        processor.temporalPatchSize = static_cast<int64_t>(numberOf(path, json, "temporal_patch_size"));
        processor.mergeSize = static_cast<int64_t>(numberOf(path, json, "merge_size"));
    }
    return processor;
}

std::vector<float> readPixels(std::string const& path, Processor const& processor)
{
    Image const image = readImage(path);
    if (image.width != processor.width || image.height != processor.height)
    {
        throw std::runtime_error(path + " is " + std::to_string(image.width) + "x" + std::to_string(image.height)
            + ": scale it to " + std::to_string(processor.width) + "x" + std::to_string(processor.height));
    }
    std::vector<float> pixels;
    if (processor.patchSize == 0)
    {
        for (int64_t channel = 0; channel < kNumChannels; ++channel)
        {
            addBlock(pixels, image, processor, channel, 0, 0, image.height, image.width);
        }
        return pixels;
    }
    // Row and column of the token, row and column of the patch in the token, channel, frame, row and column in the patch.
    int64_t const side = processor.patchSize * processor.mergeSize;
    int64_t const numColumns = image.width / side;
    for (int64_t token = 0; token < image.height / side * numColumns; ++token)
    {
        for (int64_t patch = 0; patch < processor.mergeSize * processor.mergeSize; ++patch)
        {
            int64_t const row = token / numColumns * side + patch / processor.mergeSize * processor.patchSize;
            int64_t const column = token % numColumns * side + patch % processor.mergeSize * processor.patchSize;
            for (int64_t channel = 0; channel < kNumChannels; ++channel)
            {
                for (int64_t frame = 0; frame < processor.temporalPatchSize; ++frame)
                {
                    addBlock(pixels, image, processor, channel, row, column, processor.patchSize, processor.patchSize);
                }
            }
        }
    }
    return pixels;
}
