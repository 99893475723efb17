// Vectors of LANES numbers. The compiler maps its vector types to the processor's registers: one with AVX-512, two with
// AVX2, four with NEON.

#pragma once

#include <cstdint>
#include <cstring>

namespace pra {

constexpr int64_t LANES = 16;

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef float Half __attribute__((vector_size(LANES / 2 * sizeof(float))));

// The bits of each number of a V.
template <class V>
struct BitsOf {
    typedef uint32_t type __attribute__((vector_size(sizeof(V))));
};
template <>
struct BitsOf<float> {
    using type = uint32_t;
};
using Words = BitsOf<Lanes>::type;

template <class To, class From>
inline To bits_as(const From& bits) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &bits, sizeof to);
    return to;
}

// Loads as many numbers as a V has, from x on.
template <class V, class Number>
inline V load(const Number* x) {
    V v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

// Loops over whole vectors, then half a vector, then single numbers. term(V{}, i) is for the numbers from i on.

// y[i] = term(i) for all of 0..size.
template <class Term>
inline void each(int64_t size, float* y, const Term& term) {
    const auto put = [&](auto like, int64_t i) {
        const auto v = term(like, i);
        std::memcpy(y + i, &v, sizeof v);
    };
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) put(Lanes{}, i);
    if (i + LANES / 2 <= size) put(Half{}, i), i += LANES / 2;
    for (; i < size; i++) put(float{}, i);
}

// The sum of term(i) over 0..size, always in the same order.
template <class Term>
inline float sum(int64_t size, const Term& term) {
    Lanes sums = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += term(Lanes{}, i);
    Half halves[2];
    std::memcpy(halves, &sums, sizeof sums);
    Half half = halves[0] + halves[1];
    if (i + LANES / 2 <= size) half += term(Half{}, i), i += LANES / 2;
    static_assert(LANES == 16);
    float total = ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
    for (; i < size; i++) total += term(float{}, i);
    return total;
}

// e^x to about a unit in the last place (Cephes' polynomial).
template <class V>
inline V exponential(V x) {
    using Bits = typename BitsOf<V>::type;
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a number added to it loses its fraction
    const V low = V{} - 87.0f, high = V{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const V whole = x * 1.44269504f + ROUND, n = whole - ROUND;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_as<V>((bits_as<Bits>(whole) - bits_as<Bits>(V{} + ROUND) + 127) << 23);
}

template <class V>
inline V silu(V x) {
    return x / (1.0f + exponential(-x));
}

inline float dot(const float* x, const float* y, int64_t size) {
    return sum(size, [=](auto v, int64_t i) { return load<decltype(v)>(x + i) * load<decltype(v)>(y + i); });
}

}  // namespace pra
