// x @ matrix + bias in float32, or with both rounded to bfloat16.
//
// Every sum runs in one order: a number depends neither on the other rows of its batch nor on the number of threads.
//
// Matrices come as panels of LANES outputs (pra.sampling.native.parts). An input times a vector of a panel adds to
// LANES sums, so nothing is summed across a vector. In bfloat16 a panel holds pairs of inputs, as the tiles of AMX need
// them. Without AMX a vector of pairs is split, and x is not rounded.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(PRA_WITHOUT_AMX) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define PRA_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#endif

namespace pra {

// x @ matrix + bias: panels of (inputs, LANES), the last one padded with zeros; the bias is padded too, or null.
// Panels in bfloat16 are (inputs / 2, LANES, 2), with the inputs padded to a multiple of DEEP.
struct Linear {
    const void* panels;
    const float* bias;
    int64_t inputs, outputs, bfloat16;
};

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_SUMS = 16;  // of 32 registers
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 4, TILE_SUMS = 4;  // of four registers each
#else
constexpr int TILE_ROWS = 4, TILE_SUMS = 4;  // with AVX2 of two registers each, of 16
#endif

constexpr int64_t DEEP = 32;  // inputs that a tile of AMX multiplies at once

inline int64_t filled(int64_t inputs) { return (inputs + DEEP - 1) / DEEP * DEEP; }

// A buffer for numbers between two products, one for each thread and each What.
template <class What, class Number>
Number* room(size_t size) {
    static thread_local std::vector<Number> kept;
    if (kept.size() < size) kept.resize(size);
    return kept.data();
}

inline void add_bias(const Linear& linear, int64_t panel, Lanes& sums) {
    if (linear.bias) sums += load<Lanes>(linear.bias + panel * LANES);
}

inline void put(const Linear& linear, int64_t panel, const Lanes& sums, float* y) {
    const int64_t first = panel * LANES, valid = std::min(LANES, linear.outputs - first);
    if (valid == LANES)
        std::memcpy(y + first, &sums, sizeof sums);
    else
        std::memcpy(y + first, &sums, valid * sizeof(float));
}

// ROWS rows times PANELS panels in float32, or in bfloat16 (LOW), where each vector of pairs is split.
template <bool LOW, int ROWS, int PANELS>
void tile(const Linear& linear, int64_t panel, const float* x, float* y) {
    const int64_t inputs = linear.inputs;
    Lanes sums[PANELS][ROWS] = {};
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++) add_bias(linear, panel + p, sums[p][r]);
    if constexpr (LOW) {
        const int64_t deep = filled(inputs) / 2;
        const auto* weights = static_cast<const uint32_t*>(linear.panels) + panel * deep * LANES;
        for (int64_t i = 0; i < inputs; i++)
            for (int p = 0; p < PANELS; p++) {
                const Words pairs = load<Words>(weights + (p * deep + i / 2) * LANES);
                const Lanes column = bits_as<Lanes>(i % 2 ? pairs & 0xFFFF0000u : pairs << 16);
                for (int r = 0; r < ROWS; r++) sums[p][r] += column * x[r * inputs + i];
            }
    } else {
        const float* weights = static_cast<const float*>(linear.panels) + panel * inputs * LANES;
        for (int64_t i = 0; i < inputs; i++)
            for (int p = 0; p < PANELS; p++) {
                const Lanes column = load<Lanes>(weights + (p * inputs + i) * LANES);
                for (int r = 0; r < ROWS; r++) sums[p][r] += column * x[r * inputs + i];
            }
    }
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < ROWS; r++) put(linear, panel + p, sums[p][r], y + r * linear.outputs);
}

// The panels from first to last, as many at a time as there are registers.
template <bool LOW, int ROWS, int PANELS>
void rows_of(const Linear& linear, int64_t first, int64_t last, const float* x, float* y) {
    for (; first + PANELS <= last; first += PANELS) tile<LOW, ROWS, PANELS>(linear, first, x, y);
    if constexpr (PANELS > 1) rows_of<LOW, ROWS, PANELS / 2>(linear, first, last, x, y);
}

// Tiles of ROWS rows, then smaller tiles for the rest.
template <bool LOW, int ROWS>
void tiles(const Linear& linear, int64_t first, int64_t last, int64_t rows, const float* x, float* y) {
    constexpr int PANELS = TILE_SUMS / ROWS < 1 ? 1 : TILE_SUMS / ROWS > 8 ? 8 : TILE_SUMS / ROWS;
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * linear.inputs, y += ROWS * linear.outputs)
        rows_of<LOW, ROWS, PANELS>(linear, first, last, x, y);
    if constexpr (ROWS > 1)
        if (rows) tiles<LOW, ROWS / 2>(linear, first, last, rows, x, y);
}

// Calls part(first, last) over ranges of a few panels, for all rows: a few panels stay in the fastest cache.
template <class Part>
void by_panels(const Linear& linear, int64_t multiplications, int threads, const Part& part) {
    shared_out(threads, (linear.outputs + LANES - 1) / LANES, multiplications, [&](int64_t first, int64_t last) {
        constexpr int64_t FEW = 4 * 2;
        for (int64_t p = first; p < last; p += FEW) part(p, std::min(p + FEW, last));
    });
}

// Rounds to the nearest bfloat16, ties to even; NaNs stay NaNs.
inline uint16_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t up = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : up);
}

#if PRA_AMX
#define PRA_TILES __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t TALL = 16;        // rows of a tile
constexpr int64_t MUCH_FASTER = 8;  // than float32: threads pay off only for larger products

// Returns whether the processor has tiles, and the system lets this process use them.
inline bool has_tiles() {
    static const bool found = [] {
        constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of Linux
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
        return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return found;
}

// TALL rows of x, (TALL, deep) in bfloat16, times PANELS panels. The sums are (PANELS, TALL, LANES).
template <int PANELS>
PRA_TILES void tall(const uint16_t* weights, int64_t deep, const uint16_t* x, float* sums) {
    _tile_zero(0);
    if constexpr (PANELS > 1) _tile_zero(1);
    if constexpr (PANELS > 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const int64_t panel = deep * LANES, pair = 2 * sizeof(uint16_t);
    for (int64_t i = 0; i < deep; i += DEEP, weights += DEEP * LANES) {
        _tile_loadd(4, x + i, deep * sizeof(uint16_t));
        _tile_loadd(5, weights, LANES * pair);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (PANELS > 1) {
            _tile_loadd(6, weights + panel, LANES * pair);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (PANELS > 2) {
            _tile_loadd(7, weights + 2 * panel, LANES * pair);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, weights + 3 * panel, LANES * pair);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    constexpr int64_t ROW = LANES * sizeof(float);
    _tile_stored(0, sums, ROW);
    if constexpr (PANELS > 1) _tile_stored(1, sums + TALL * LANES, ROW);
    if constexpr (PANELS > 2) {
        _tile_stored(2, sums + 2 * TALL * LANES, ROW);
        _tile_stored(3, sums + 3 * TALL * LANES, ROW);
    }
}

template <int PANELS>
void tall_rows(const Linear& linear, int64_t first, int64_t last, int64_t rows, const uint16_t* x, float* y) {
    const int64_t deep = filled(linear.inputs);
    alignas(64) float sums[PANELS * TALL * LANES];
    for (; first + PANELS <= last; first += PANELS)
        for (int64_t r = 0; r < rows; r += TALL) {
            tall<PANELS>(static_cast<const uint16_t*>(linear.panels) + first * deep * LANES, deep, x + r * deep, sums);
            for (int64_t p = 0; p < PANELS; p++)
                for (int64_t k = 0; k < std::min(TALL, rows - r); k++) {
                    Lanes row = load<Lanes>(sums + (p * TALL + k) * LANES);
                    add_bias(linear, first + p, row);
                    put(linear, first + p, row, y + (r + k) * linear.outputs);
                }
        }
    if constexpr (PANELS > 1) tall_rows<PANELS / 2>(linear, first, last, rows, x, y);
}

PRA_TILES inline void with_tiles(const Linear& linear, int64_t first, int64_t last, int64_t rows, const uint16_t* x,
                                 float* y) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TALL, TALL, TALL, TALL, TALL, TALL, TALL, TALL};
    } const shape;
    _tile_loadconfig(&shape);
    tall_rows<4>(linear, first, last, rows, x, y);
    _tile_release();
}

inline void product_by_tiles(const Linear& linear, const float* x, float* y, int64_t rows, int threads) {
    const int64_t inputs = linear.inputs, deep = filled(inputs), height = (rows + TALL - 1) / TALL * TALL;
    uint16_t* low = room<struct Rounded, uint16_t>(height * deep);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < inputs; i++) low[r * deep + i] = rounded(x[r * inputs + i]);
        std::fill(low + r * deep + inputs, low + (r + 1) * deep, 0);
    }
    std::fill(low + rows * deep, low + height * deep, 0);
    by_panels(linear, rows * inputs * linear.outputs / MUCH_FASTER, threads,
              [&](int64_t first, int64_t last) { with_tiles(linear, first, last, rows, low, y); });
}
#endif

inline void product(const Linear& linear, const float* x, float* y, int64_t rows, int threads) {
#if PRA_AMX
    if (linear.bfloat16 && has_tiles()) return product_by_tiles(linear, x, y, rows, threads);
#endif
    by_panels(linear, rows * linear.inputs * linear.outputs, threads, [&](int64_t first, int64_t last) {
        (linear.bfloat16 ? tiles<true, TILE_ROWS> : tiles<false, TILE_ROWS>)(linear, first, last, rows, x, y);
    });
}

}  // namespace pra
