#include "mmtok_selection.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <stdexcept>
#include <string>

namespace mmtok
{
namespace
{

constexpr float kSmallestNorm = 1e-8F;
// Partial sums that a compiler turns into vector instructions without reordering anything.
constexpr std::size_t kNumLanes = 16;

void require(bool holds, std::string const& message)
{
    if (!holds)
    {
        throw std::invalid_argument("mmtok: " + message);
    }
}

float sumOfLanes(float const (&lanes)[kNumLanes])
{
    float sum = 0.0F;
    for (float const lane : lanes)
    {
        sum += lane;
    }
    return sum;
}

float dot(float const* left, float const* right, std::size_t width)
{
    float lanes[kNumLanes] = {};
    std::size_t start = 0;
    for (; start + kNumLanes <= width; start += kNumLanes)
    {
        for (std::size_t lane = 0; lane < kNumLanes; ++lane)
        {
            lanes[lane] += left[start + lane] * right[start + lane];
        }
    }
    for (std::size_t lane = 0; start + lane < width; ++lane)
    {
        lanes[lane] += left[start + lane] * right[start + lane];
    }
    return sumOfLanes(lanes);
}

//! Returns the sum of what the column exceeds `covered` by. Every step rounds monotonically and in one order, so that
//! the gain of a column never rises as `covered` does: an old gain is an upper bound, exactly.
float gainOf(float const* column, float const* covered, std::size_t numRows)
{
    float lanes[kNumLanes] = {};
    std::size_t start = 0;
    for (; start + kNumLanes <= numRows; start += kNumLanes)
    {
        for (std::size_t lane = 0; lane < kNumLanes; ++lane)
        {
            lanes[lane] += std::max(column[start + lane] - covered[start + lane], 0.0F);
        }
    }
    for (std::size_t lane = 0; start + lane < numRows; ++lane)
    {
        lanes[lane] += std::max(column[start + lane] - covered[start + lane], 0.0F);
    }
    return sumOfLanes(lanes);
}

//! Returns the rows at length 1; those shorter than 1e-8 are divided by that.
std::vector<float> unitRows(Rows rows, char const* name)
{
    std::vector<float> unit(rows.data, rows.data + rows.count * rows.width);
    for (std::size_t row = 0; row < rows.count; ++row)
    {
        float* values = unit.data() + row * rows.width;
        float const norm = std::sqrt(dot(values, values, rows.width));
        require(std::isfinite(norm), std::string(name) + " has a row whose length is not finite, row " + std::to_string(row));
        for (std::size_t column = 0; column < rows.width; ++column)
        {
            values[column] /= std::max(norm, kSmallestNorm);
        }
    }
    return unit;
}

//! Coverage matrix C [numRows, numTokens], stored by token.
struct CoverageMatrix
{
    std::size_t numRows{0};
    std::size_t numTokens{0};
    std::vector<float> values;

    float const* column(std::size_t token) const
    {
        return values.data() + token * numRows;
    }

    //! Adds rows `firstRow`, ...: the softmax over all tokens of the cosines of each query with each token, times scale.
    void fill(std::size_t firstRow, std::vector<float> const& queries, std::size_t numQueries,
        std::vector<float> const& tokens, float temperature, float scale)
    {
        std::size_t const width = tokens.size() / numTokens;
        std::vector<float> row(numTokens);
        for (std::size_t query = 0; query < numQueries; ++query)
        {
            for (std::size_t token = 0; token < numTokens; ++token)
            {
                row[token] = dot(queries.data() + query * width, tokens.data() + token * width, width) / temperature;
            }
            float const largest = *std::max_element(row.begin(), row.end());
            float sum = 0.0F;
            for (float& value : row)
            {
                value = std::exp(value - largest);
                sum += value;
            }
            for (std::size_t token = 0; token < numTokens; ++token)
            {
                values[token * numRows + firstRow + query] = row[token] / sum * scale;
            }
        }
    }
};

CoverageMatrix coverageMatrix(Rows vision, Rows keys, Rows text, Config const& config)
{
    std::size_t const numText = config.coverage == Coverage::kVision ? 0 : text.count;
    std::size_t const numImage = config.coverage == Coverage::kText ? 0 : keys.count;
    CoverageMatrix matrix{numText + numImage, vision.count, {}};
    matrix.values.resize(matrix.numRows * matrix.numTokens);
    if (numText > 0)
    {
        matrix.fill(0, unitRows(text, "text"), numText, unitRows(vision, "vision"), config.textTemperature,
            1.0F / static_cast<float>(numText));
    }
    if (numImage > 0)
    {
        // Without rows of text alpha would only scale every gain.
        float const weight = numText > 0 ? config.alpha : 1.0F;
        std::vector<float> const unitKeys = unitRows(keys, "keys");
        matrix.fill(numText, unitKeys, numImage, unitKeys, config.visionTemperature,
            weight / static_cast<float>(numImage));
    }
    return matrix;
}

void checkInputs(Rows vision, Rows keys, Rows text, std::size_t budget, Config const& config,
    std::vector<uint8_t> const& excluded)
{
    require(vision.count > 0 && vision.width > 0, "vision has no tokens");
    require(budget > 0, "budget is at least 1, got 0");
    require(std::isfinite(config.textTemperature) && config.textTemperature > 0 && std::isfinite(config.visionTemperature)
            && config.visionTemperature > 0,
        "temperatures are positive numbers");
    require(std::isfinite(config.alpha) && config.alpha >= 0, "alpha is a number of at least 0");
    if (config.coverage != Coverage::kText)
    {
        require(keys.count == vision.count && keys.width > 0,
            "keys has one row a token, expected " + std::to_string(vision.count) + ", got " + std::to_string(keys.count));
    }
    if (config.coverage != Coverage::kVision)
    {
        require(text.count == 0 || text.width == vision.width,
            "text is as wide as vision, expected " + std::to_string(vision.width) + ", got "
                + std::to_string(text.width));
        require(text.count > 0 || config.coverage != Coverage::kText, "coverage of the text needs a row of text");
    }
    require(excluded.empty() || excluded.size() == vision.count,
        "excluded has one value a token, expected " + std::to_string(vision.count) + ", got "
            + std::to_string(excluded.size()));
}

//! A token whose gain was computed before pick `numPicked`. The queue's top has the largest gain, then the lowest index.
struct Candidate
{
    float gain;
    int32_t token;
    std::size_t numPicked;

    bool operator<(Candidate const& other) const
    {
        return gain != other.gain ? gain < other.gain : token > other.token;
    }
};

} // namespace

Selection selectTokens(Rows vision, Rows keys, Rows text, std::size_t budget, Config const& config,
    std::vector<uint8_t> const& excluded)
{
    checkInputs(vision, keys, text, budget, config, excluded);
    CoverageMatrix const matrix = coverageMatrix(vision, keys, text, config);
    std::vector<float> covered(matrix.numRows, 0.0F);
    std::vector<float> all(matrix.numRows, 0.0F);
    std::priority_queue<Candidate> candidates;
    for (std::size_t token = 0; token < matrix.numTokens; ++token)
    {
        float const* column = matrix.column(token);
        if (excluded.empty() || excluded[token] == 0)
        {
            candidates.push({gainOf(column, covered.data(), matrix.numRows), static_cast<int32_t>(token), 0});
        }
        std::transform(column, column + matrix.numRows, all.begin(), all.begin(),
            [](float left, float right) { return std::max(left, right); });
    }
    std::vector<float> const none(matrix.numRows, 0.0F);
    Selection selection;
    selection.total = gainOf(all.data(), none.data(), matrix.numRows);
    while (selection.order.size() < budget && !candidates.empty())
    {
        Candidate best = candidates.top();
        candidates.pop();
        float const* column = matrix.column(best.token);
        if (best.numPicked != selection.order.size())
        {
            best = {gainOf(column, covered.data(), matrix.numRows), best.token, selection.order.size()};
            candidates.push(best);
            continue;
        }
        std::transform(column, column + matrix.numRows, covered.begin(), covered.begin(),
            [](float left, float right) { return std::max(left, right); });
        selection.order.push_back(best.token);
        selection.coverage.push_back(gainOf(covered.data(), none.data(), matrix.numRows));
    }
    selection.kept = selection.order;
    std::sort(selection.kept.begin(), selection.kept.end());
    return selection;
}

} // namespace mmtok
