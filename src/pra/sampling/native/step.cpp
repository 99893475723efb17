// One token's arithmetic on a CPU: a transformer's step and one evaluation of the head. The formulas are those of the
// model's modules (pra/models); tests compare the results. Everything is float32, except that products may multiply
// bfloat16 numbers (products.h).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "products.h"
#include "threads.h"
#include "vectors.h"

namespace pra {

struct Block {
    const float* attention_norm;
    Linear qkv, out;
    const float* mlp_norm;
    Linear into, mlp_out;
};

struct HeadBlock {
    const float *norm, *norm_bias;
    Linear into, out;
    int64_t modulation;
};

constexpr float EPSILON = 1e-6f;  // of every norm in the models but the states'

void rms_norm(const float* x, const float* weight, float* y, int64_t width) {
    const float factor = 1.0f / std::sqrt(dot(x, x, width) / width + EPSILON);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
}

// Shifts x to zero mean, and returns the factor that gives a variance of 1.
float centred(const float* x, float epsilon, float* y, int64_t width) {
    const float mean = sum(width, [=](auto v, int64_t i) { return load<decltype(v)>(x + i); }) / width;
    for (int64_t i = 0; i < width; i++) y[i] = x[i] - mean;
    return 1.0f / std::sqrt(dot(y, y, width) / width + epsilon);
}

// shift + scale * LayerNorm(x); weight and bias of the LayerNorm may be null.
void modulated_norm(const float* x, const float* weight, const float* bias, const float* shift, const float* scale,
                    float* y, int64_t width) {
    const float factor = centred(x, EPSILON, y, width);
    if (weight)
        for (int64_t i = 0; i < width; i++) y[i] = shift[i] + scale[i] * (y[i] * factor * weight[i] + bias[i]);
    else
        for (int64_t i = 0; i < width; i++) y[i] = shift[i] + scale[i] * (y[i] * factor);
}

// silu(gate) * value of (rows, 2 hidden), as (rows, hidden).
void gated(const float* x, float* y, int64_t rows, int64_t hidden) {
    for (int64_t r = 0; r < rows; r++, x += 2 * hidden, y += hidden)
        each(hidden, y, [=](auto v, int64_t i) {
            return silu(load<decltype(v)>(x + i)) * load<decltype(v)>(x + hidden + i);
        });
}

// Rotates one attention head after a norm without weight: x * own + (x with its halves exchanged) * other.
void turned(float* x, const float* own, const float* other, int64_t size) {
    const float factor = 1.0f / std::sqrt(dot(x, x, size) / size + EPSILON);
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i] * factor, b = x[half + i] * factor;
        x[i] = a * own[i] + b * other[i];
        x[half + i] = b * own[half + i] + a * other[half + i];
    }
}

// softmax(q k / sqrt(size)) v over `tokens` tokens; `scores` is a buffer of as many numbers.
void attend(const float* query, const float* keys, const float* values, int64_t tokens, int64_t size, float* scores,
            float* y) {
    const float factor = 1.0f / std::sqrt(static_cast<float>(size));
    float most = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        scores[t] = dot(query, keys + t * size, size) * factor;
        most = scores[t] > most ? scores[t] : most;
    }
    each(tokens, scores, [=](auto v, int64_t t) { return exponential(load<decltype(v)>(scores + t) - most); });
    const float share = 1.0f / sum(tokens, [=](auto v, int64_t t) { return load<decltype(v)>(scores + t); });
    each(size, y, [=](auto v, int64_t i) {
        for (int64_t t = 0; t < tokens; t++) v += scores[t] * load<decltype(v)>(values + t * size + i);
        return v * share;
    });
}

// Runs `tokens` tokens after the `before` tokens in the cache: x (sequences, tokens, width), in place. A token attends
// to the tokens before it and to all of its own `group`.
// own, other: (any, depth, 2, size), the rotary table from the first token on, for queries and keys.
// keys, values: (depth, sequences, heads, capacity, size), or null if every token is a sequence of its own.
void transformer(const Block* blocks, int64_t depth, const float* norm, int64_t heads, int64_t width, float* x,
                 int64_t sequences, int64_t tokens, int64_t group, const float* own, const float* other, float* keys,
                 float* values, int64_t capacity, int64_t before, int32_t threads) {
    const int64_t size = width / heads, hidden = blocks[0].mlp_out.inputs, rows = sequences * tokens;
    const int64_t widest = std::max(3 * width, 3 * hidden), attended = sequences * heads * (before + tokens);
    float* normed = room<struct Between, float>(rows * (2 * width + widest) + attended);
    float *y = normed + rows * width, *wide = y + rows * width, *narrow = wide + rows * 2 * hidden;
    float* scores = wide + rows * widest;
    for (int64_t layer = 0; layer < depth; layer++) {
        const Block& block = blocks[layer];
        for (int64_t r = 0; r < rows; r++) rms_norm(x + r * width, block.attention_norm, normed + r * width, width);
        product(block.qkv, normed, wide, rows, threads);
        // Takes the tokens of one head of a sequence in order. At the last token of a group the whole group attends.
        const auto attention = [&](int64_t first, int64_t last) {
            for (int64_t k = first; k < last; k++)
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t row = k / heads * tokens + t, column = k % heads * size;
                    float* q = wide + row * 3 * width + column;
                    float *key = q + width, *value = key + width;
                    if (!keys) {
                        std::memcpy(y + row * width + column, value, size * sizeof(float));
                        continue;
                    }
                    const int64_t turns = (t * depth + layer) * 2 * size, seen = before + t;
                    float* all_keys = keys + (layer * sequences * heads + k) * capacity * size;
                    float* all_values = values + (layer * sequences * heads + k) * capacity * size;
                    turned(q, own + turns, other + turns, size);
                    turned(key, own + turns + size, other + turns + size, size);
                    std::memcpy(all_keys + seen * size, key, size * sizeof(float));
                    std::memcpy(all_values + seen * size, value, size * sizeof(float));
                    if ((t + 1) % group) continue;
                    for (int64_t r = row - group + 1; r <= row; r++)
                        attend(wide + r * 3 * width + column, all_keys, all_values, seen + 1, size,
                               scores + k * (before + tokens), y + r * width + column);
                }
        };
        shared_out(threads, sequences * heads, 2 * rows * width * (before + tokens), attention);
        product(block.out, y, normed, rows, threads);
        for (int64_t i = 0; i < rows * width; i++) x[i] += normed[i];
        for (int64_t r = 0; r < rows; r++) rms_norm(x + r * width, block.mlp_norm, normed + r * width, width);
        product(block.into, normed, wide, rows, threads);
        gated(wide, narrow, rows, hidden);
        product(block.mlp_out, narrow, normed, rows, threads);
        for (int64_t i = 0; i < rows * width; i++) x[i] += normed[i];
    }
    for (int64_t r = 0; r < rows; r++) rms_norm(x + r * width, norm, x + r * width, width);
}

// The head's prediction y (rows, state) at one time. states: (given, state), repeated for all rows.
// modulated: (rows, all modulations), in the layout of pra/sampling/native/parts.py.
void head(const HeadBlock* blocks, int64_t depth, const Linear* state_in, const Linear* out, const float* states,
          int64_t given, int64_t rows, const float* modulated, int64_t stride, float* y, int32_t threads) {
    const int64_t width = state_in->outputs, hidden = depth ? blocks[0].out.inputs : 0;
    float* x = room<struct Between, float>(rows * (2 * width + 3 * hidden));
    float *normed = x + rows * width, *wide = normed + rows * width, *narrow = wide + rows * 2 * hidden;
    product(*state_in, states, x, given, threads);
    for (int64_t r = given; r < rows; r++) std::memcpy(x + r * width, x + r % given * width, width * sizeof(float));
    for (int64_t k = 0; k < depth; k++) {
        const HeadBlock& block = blocks[k];
        const float* shift = modulated + 3 * block.modulation * width;
        for (int64_t r = 0; r < rows; r++)
            modulated_norm(x + r * width, block.norm, block.norm_bias, shift + r * stride, shift + r * stride + width,
                           normed + r * width, width);
        product(block.into, normed, wide, rows, threads);
        gated(wide, narrow, rows, hidden);
        product(block.out, narrow, normed, rows, threads);
        for (int64_t r = 0; r < rows; r++) {
            const float* gate = shift + r * stride + 2 * width;
            for (int64_t i = 0; i < width; i++) x[r * width + i] += gate[i] * normed[r * width + i];
        }
    }
    const float* shift = modulated + stride - 2 * width;
    for (int64_t r = 0; r < rows; r++)
        modulated_norm(x + r * width, nullptr, nullptr, shift + r * stride, shift + r * stride + width,
                       normed + r * width, width);
    product(*out, normed, y, rows, threads);
}

// silu(times + condition) of every time and row: (times, rows, width).
void context(const float* times, int64_t count, const float* condition, int64_t rows, int64_t width, float* y) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t r = 0; r < rows; r++, y += width)
            each(width, y, [=](auto v, int64_t i) {
                return silu(load<decltype(v)>(times + k * width + i) + load<decltype(v)>(condition + r * width + i));
            });
}

// LayerNorm without weights of (rows, width).
void normalise(const float* x, int64_t rows, int64_t width, float* y) {
    constexpr float STATES = 1e-5f;  // torch's default
    for (int64_t r = 0; r < rows; r++, x += width, y += width) {
        const float factor = centred(x, STATES, y, width);
        for (int64_t i = 0; i < width; i++) y[i] *= factor;
    }
}

// A hash of `size` numbers, to see whether weights have changed. Each lane has a hash; all are combined at the end.
uint64_t hash(const void* numbers, int64_t size) {
    constexpr int64_t TOGETHER = 4;  // multiplications take turns
    Words sums[TOGETHER] = {};
    const char* from = static_cast<const char*>(numbers);
    int64_t i = 0;
    for (; i + TOGETHER * LANES <= size; i += TOGETHER * LANES)
        for (int64_t k = 0; k < TOGETHER; k++)
            sums[k] = sums[k] * 0x9E3779B1u + load<Words>(from + (i + k * LANES) * sizeof(uint32_t));
    uint64_t whole = 0;
    for (int64_t k = 0; k < TOGETHER; k++)
        for (int64_t lane = 0; lane < LANES; lane++) whole = (whole ^ sums[k][lane]) * 0x100000001B3u;
    for (; i < size; i++) {
        uint32_t number;
        std::memcpy(&number, from + i * sizeof number, sizeof number);
        whole = (whole ^ number) * 0x100000001B3u;
    }
    return whole;
}

// Returns 0, or 1 if memory is short: an exception must not reach a caller outside C++.
template <class Work>
int32_t done(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

extern "C" {

int32_t pra_product(const Linear* linear, const float* x, float* y, int64_t rows, int32_t threads) {
    return done([=] { product(*linear, x, y, rows, threads); });
}

int32_t pra_transformer(const Block* blocks, int64_t depth, const float* norm, int64_t heads, int64_t width, float* x,
                        int64_t sequences, int64_t tokens, int64_t group, const float* own, const float* other,
                        float* keys, float* values, int64_t capacity, int64_t before, int32_t threads) {
    return done([=] {
        transformer(blocks, depth, norm, heads, width, x, sequences, tokens, group, own, other, keys, values, capacity,
                    before, threads);
    });
}

int32_t pra_head(const HeadBlock* blocks, int64_t depth, const Linear* state_in, const Linear* out, const float* states,
                 int64_t given, int64_t rows, const float* modulated, int64_t stride, float* y, int32_t threads) {
    return done([=] { head(blocks, depth, state_in, out, states, given, rows, modulated, stride, y, threads); });
}

int32_t pra_context(const float* times, int64_t count, const float* condition, int64_t rows, int64_t width, float* y) {
    return done([=] { context(times, count, condition, rows, width, y); });
}

int32_t pra_normalise(const float* x, int64_t rows, int64_t width, float* y) {
    return done([=] { normalise(x, rows, width, y); });
}

uint64_t pra_hash(const void* numbers, int64_t size) { return hash(numbers, size); }

}  // extern "C"

}  // namespace pra
