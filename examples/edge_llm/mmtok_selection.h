// MMTok's selection of vision tokens in float32 on the CPU. C++17, no dependencies.
// Source: MMTok, arXiv 2508.18264, sections 3.1 to 3.3 and Algorithm 2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mmtok
{

//! What the kept tokens have to cover: the text and the image, the text alone (Algorithm 1), or the image alone.
enum class Coverage
{
    kMultimodal,
    kText,
    kVision,
};

//! The constants of one selection; the defaults are the authors' for LLaVA. For the Qwens textTemperature is 0.01.
struct Config
{
    float textTemperature{0.02F}; //!< of the text-to-vision softmax
    float visionTemperature{0.2F}; //!< of the vision-to-vision softmax
    float alpha{0.5F}; //!< weight of covering the image against covering the text
    Coverage coverage{Coverage::kMultimodal};
};

//! A non-owning row-major matrix [count, width].
struct Rows
{
    float const* data{nullptr};
    std::size_t count{0};
    std::size_t width{0};
};

struct Selection
{
    std::vector<int32_t> order; //!< token indices as picked
    std::vector<int32_t> kept; //!< the same, ascending
    std::vector<float> coverage; //!< coverage after each pick, never falling
    float total{0.0F}; //!< coverage of all tokens
};

//! Returns the tokens that greedy maximum coverage keeps; of equal gains the lowest index wins.
//!
//! \param vision [N, D] vision tokens after the projector, N at least 1.
//! \param keys [N, d] vision features before the projector; not read where coverage is kText.
//! \param text [M, D] input embeddings of the question's words. M may be 0 unless coverage is kText; not read where it
//!     is kVision.
//! \param budget Tokens to keep, at least 1; fewer are kept where fewer may be.
//! \param config Temperatures, weight, coverage.
//! \param excluded [N], not 0 for tokens never to pick; empty for none.
//! \throws std::invalid_argument Sizes that do not fit, constants out of range, a feature that is not finite.
Selection selectTokens(Rows vision, Rows keys, Rows text, std::size_t budget, Config const& config = {},
    std::vector<uint8_t> const& excluded = {});

} // namespace mmtok
