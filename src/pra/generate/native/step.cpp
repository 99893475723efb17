// One token's arithmetic on a CPU: a transformer's step and one evaluation of the head. Everything is float32, but for
// products that are asked for in bfloat16: their inputs and matrices are rounded to it, their sums are float32 again.
//
// The formulas are those of pra/generate/step.py, which the tests hold this file to. A number depends neither on the
// other rows of its batch nor on how many threads share the work: every sum runs in one order.
//
// Matrices come as panels (pra.generate.native.parts.panels): LANES outputs side by side, so that one input times one vector of a
// panel adds to LANES sums, and nothing has to be summed across a vector. The compiler's vector types make of a vector
// what the processor has: one register with AVX-512, two with AVX2, four with NEON. In bfloat16 a panel holds pairs of
// inputs, which is what the tiles of AMX multiply.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

#if defined(__x86_64__) && defined(__linux__) && !defined(PRA_WITHOUT_AMX) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define PRA_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#endif

namespace {

constexpr int64_t LANES = 16;
constexpr float EPSILON = 1e-6f;  // of every norm in the models
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_SUMS = 16;  // of 32 registers
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 4, TILE_SUMS = 4;  // of four registers each
#else
constexpr int TILE_ROWS = 4, TILE_SUMS = 4;  // with AVX2 of two registers each, of 16
#endif

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(4), may_alias));

inline Words bits_of(Lanes x) {
    Words bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline Lanes number_of(Words bits) {
    Lanes x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// --- threads ----------------------------------------------------------------------------------------------------

// Threads that wait, awake for a moment and then asleep. One job at a time: who comes while it is busy works alone.
class Pool {
   public:
    static Pool& here() {
        // After a fork the threads are not there any more; the old pool is left to lie.
        static std::mutex guard;
        static Pool* pool = nullptr;
        std::lock_guard<std::mutex> lock(guard);
        if (!pool || pool->process_ != getpid()) pool = new Pool();
        return *pool;
    }

    // work(k) for every k below count, on as many threads if they can be had; that of the caller is one of them.
    void run(int count, const std::function<void(int)>& work) {
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        const int helpers = only.owns_lock() ? started(count - 1) : 0;
        if (helpers) {
            {
                std::lock_guard<std::mutex> lock(state_);
                work_ = &work;
                helpers_ = helpers;
                left_.store(helpers, std::memory_order_relaxed);
                round_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        work(0);
        for (int k = helpers + 1; k < count; k++) work(k);
        while (helpers && left_.load(std::memory_order_acquire)) std::this_thread::yield();
    }

   private:
    // As many of the threads wanted as there are, or as the system lets be made.
    int started(int wanted) {
        try {
            for (; threads_ < wanted; threads_++)
                std::thread([this, number = threads_ + 1, seen = round_.load()] { serve(number, seen); }).detach();
        } catch (const std::system_error&) {
        }
        return std::min(wanted, threads_);
    }

    void serve(int number, uint32_t seen) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
            while (round_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {}
            const std::function<void(int)>* work = nullptr;
            {
                std::unique_lock<std::mutex> lock(state_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                seen = round_.load(std::memory_order_relaxed);
                if (number <= helpers_) work = work_;
            }
            if (!work) continue;
            (*work)(number);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    const pid_t process_ = getpid();
    std::mutex busy_, state_;
    std::condition_variable wake_;
    int threads_ = 0;
    // The job of a round, under state_.
    const std::function<void(int)>* work_ = nullptr;
    int helpers_ = 0;
    std::atomic<int> left_{0};
    std::atomic<uint32_t> round_{0};
};

// Below so many multiplications for each of them threads cost more than they bring.
constexpr int64_t WORTH_A_THREAD = 200'000;

// part(first, last) over ranges that together are 0..size, on at most so many threads.
template <class Part>
void shared_out(int threads, int64_t size, int64_t multiplications, const Part& part) {
    const int64_t count = std::min<int64_t>({threads, size, multiplications / WORTH_A_THREAD});
    if (count < 2) {
        part(0, size);
        return;
    }
    Pool::here().run(static_cast<int>(count), [&](int k) { part(size * k / count, size * (k + 1) / count); });
}

// --- products ---------------------------------------------------------------------------------------------------

}  // namespace

extern "C" {

// x @ matrix + bias: panels of (inputs, LANES), the last filled up with zeros; the bias filled up likewise, or null.
// In bfloat16 they are of (inputs / 2, LANES, 2), the inputs filled up to a multiple of DEEP.
struct Linear {
    const void* panels;
    const float* bias;
    int64_t inputs, outputs, bfloat16;
};

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

}  // extern "C"

namespace {

constexpr int64_t DEEP = 32;  // inputs that a tile of AMX multiplies at once

inline int64_t filled(int64_t inputs) { return (inputs + DEEP - 1) / DEEP * DEEP; }

// Numbers between two products, kept by each thread that asks; what for tells those of one from the other's.
template <class What, class Number>
Number* room(size_t size) {
    static thread_local std::vector<Number> kept;
    if (kept.size() < size) kept.resize(size);
    return kept.data();
}

inline void add_bias(const Linear& linear, int64_t panel, Lanes& sums) {
    if (linear.bias) sums += *reinterpret_cast<const Lanes*>(linear.bias + panel * LANES);
}

inline void put(const Linear& linear, int64_t panel, const Lanes& sums, float* y) {
    const int64_t first = panel * LANES, valid = std::min(LANES, linear.outputs - first);
    if (valid == LANES)
        *reinterpret_cast<Lanes*>(y + first) = sums;
    else
        std::memcpy(y + first, &sums, valid * sizeof(float));
}

// ROWS rows times PANELS panels in float32, or in bfloat16 (LOW), of which each vector of pairs is taken apart.
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
                const Words pairs = *reinterpret_cast<const Words*>(weights + (p * deep + i / 2) * LANES);
                const Lanes column = number_of(i % 2 ? pairs & 0xFFFF0000u : pairs << 16);
                for (int r = 0; r < ROWS; r++) sums[p][r] += column * x[r * inputs + i];
            }
    } else {
        const float* weights = static_cast<const float*>(linear.panels) + panel * inputs * LANES;
        for (int64_t i = 0; i < inputs; i++)
            for (int p = 0; p < PANELS; p++) {
                const Lanes column = *reinterpret_cast<const Lanes*>(weights + (p * inputs + i) * LANES);
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

// Tiles of ROWS rows as long as there are so many, then smaller ones.
template <bool LOW, int ROWS>
void tiles(const Linear& linear, int64_t first, int64_t last, int64_t rows, const float* x, float* y) {
    constexpr int PANELS = TILE_SUMS / ROWS < 1 ? 1 : TILE_SUMS / ROWS > 8 ? 8 : TILE_SUMS / ROWS;
    for (; rows >= ROWS; rows -= ROWS, x += ROWS * linear.inputs, y += ROWS * linear.outputs)
        rows_of<LOW, ROWS, PANELS>(linear, first, last, x, y);
    if constexpr (ROWS > 1)
        if (rows) tiles<LOW, ROWS / 2>(linear, first, last, rows, x, y);
}

// part(first, last) over ranges of panels, a few of them at a time, which stay in the fastest cache, for all rows.
template <class Part>
void by_panels(const Linear& linear, int64_t multiplications, int threads, const Part& part) {
    shared_out(threads, (linear.outputs + LANES - 1) / LANES, multiplications, [&](int64_t first, int64_t last) {
        constexpr int64_t FEW = 4 * 2;
        for (int64_t p = first; p < last; p += FEW) part(p, std::min(p + FEW, last));
    });
}

// To the nearest of bfloat16, ties to even; NaNs stay NaNs.
inline uint16_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t up = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : up);
}

#if PRA_AMX
#define PRA_TILES __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t TALL = 16;          // rows of a tile
constexpr int64_t MUCH_FASTER = 8;    // than products in float32: threads are worth their cost later

// Whether the processor has tiles, and the system lets this process use them.
bool has_tiles() {
    static const bool found = [] {
        constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of Linux
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
        return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return found;
}

// TALL rows of x, (TALL, deep) in bfloat16, times so many panels; their sums as (PANELS, TALL, LANES).
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
                    Lanes row = *reinterpret_cast<const Lanes*>(sums + (p * TALL + k) * LANES);
                    add_bias(linear, first + p, row);
                    put(linear, first + p, row, y + (r + k) * linear.outputs);
                }
        }
    if constexpr (PANELS > 1) tall_rows<PANELS / 2>(linear, first, last, rows, x, y);
}

PRA_TILES void with_tiles(const Linear& linear, int64_t first, int64_t last, int64_t rows, const uint16_t* x, float* y) {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TALL, TALL, TALL, TALL, TALL, TALL, TALL, TALL};
    } const shape;
    _tile_loadconfig(&shape);
    tall_rows<4>(linear, first, last, rows, x, y);
    _tile_release();
}

void product_by_tiles(const Linear& linear, const float* x, float* y, int64_t rows, int threads) {
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

void product(const Linear& linear, const float* x, float* y, int64_t rows, int threads) {
#if PRA_AMX
    if (linear.bfloat16 && has_tiles()) return product_by_tiles(linear, x, y, rows, threads);
#endif
    by_panels(linear, rows * linear.inputs * linear.outputs, threads, [&](int64_t first, int64_t last) {
        (linear.bfloat16 ? tiles<true, TILE_ROWS> : tiles<false, TILE_ROWS>)(linear, first, last, rows, x, y);
    });
}

// --- everything between products ----------------------------------------------------------------------------------

// A vector from x on, of which so many are there.
inline Lanes from(const float* x, int64_t valid) {
    if (valid == LANES) return *reinterpret_cast<const Lanes*>(x);
    Lanes lanes = {};
    std::memcpy(&lanes, x, valid * sizeof(float));
    return lanes;
}

// y[i] = term(i) for all of 0..size, a vector at a time.
template <class Term>
inline void each(int64_t size, float* y, const Term& term) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) *reinterpret_cast<Lanes*>(y + i) = term(i, LANES);
    if (i == size) return;
    const Lanes last = term(i, size - i);
    std::memcpy(y + i, &last, (size - i) * sizeof(float));
}

// e^x to about a unit in the last place (Cephes' polynomial).
inline Lanes exponential(Lanes x) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
    const Lanes low = Lanes{} - 87.0f, high = Lanes{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Lanes whole = x * 1.44269504f + ROUND, n = whole - ROUND;
    const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * number_of((bits_of(whole) - bits_of(Lanes{} + ROUND) + 127) << 23);
}

inline Lanes silu(Lanes x) { return x / (1.0f + exponential(-x)); }

// The sum of term(i), a vector from i on, over 0..size, in an order of its own; behind the end a vector has zeros.
template <class Term>
inline float sum(int64_t size, const Term& term) {
    Lanes sums = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += term(i, LANES);
    if (i < size) sums += term(i, size - i);
    float total = 0;
    for (int64_t k = 0; k < LANES; k++) total += sums[k];
    return total;
}

inline float dot(const float* x, const float* y, int64_t size) {
    return sum(size, [=](int64_t i, int64_t valid) { return from(x + i, valid) * from(y + i, valid); });
}

void rms_norm(const float* x, const float* weight, float* y, int64_t width) {
    const float factor = 1.0f / std::sqrt(dot(x, x, width) / width + EPSILON);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * factor * weight[i];
}

// LayerNorm with weight and bias, or null, then shift + scale * what it gives.
void modulated_norm(const float* x, const float* weight, const float* bias, const float* shift, const float* scale,
                    float* y, int64_t width) {
    const float mean = sum(width, [=](int64_t i, int64_t valid) { return from(x + i, valid); }) / width;
    for (int64_t i = 0; i < width; i++) y[i] = x[i] - mean;
    const float factor = 1.0f / std::sqrt(dot(y, y, width) / width + EPSILON);
    if (weight)
        for (int64_t i = 0; i < width; i++) y[i] = shift[i] + scale[i] * (y[i] * factor * weight[i] + bias[i]);
    else
        for (int64_t i = 0; i < width; i++) y[i] = shift[i] + scale[i] * (y[i] * factor);
}

// silu(gate) * value of (rows, 2 hidden), as (rows, hidden).
void gated(const float* x, float* y, int64_t rows, int64_t hidden) {
    for (int64_t r = 0; r < rows; r++, x += 2 * hidden, y += hidden)
        each(hidden, y, [=](int64_t i, int64_t valid) { return silu(from(x + i, valid)) * from(x + hidden + i, valid); });
}

// The head's size in the rotary table: x * own + (x, its halves exchanged) * other, after a norm without weight.
void turned(float* x, const float* own, const float* other, int64_t size) {
    const float factor = 1.0f / std::sqrt(dot(x, x, size) / size + EPSILON);
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i] * factor, b = x[half + i] * factor;
        x[i] = a * own[i] + b * other[i];
        x[half + i] = b * own[half + i] + a * other[half + i];
    }
}

// softmax(q k / sqrt(size)) v over so many tokens; scores is room for them.
void attend(const float* query, const float* keys, const float* values, int64_t tokens, int64_t size, float* scores,
            float* y) {
    const float factor = 1.0f / std::sqrt(static_cast<float>(size));
    float most = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        scores[t] = dot(query, keys + t * size, size) * factor;
        most = scores[t] > most ? scores[t] : most;
    }
    each(tokens, scores, [=](int64_t t, int64_t valid) { return exponential(from(scores + t, valid) - most); });
    const float total = sum(tokens, [=](int64_t i, int64_t valid) { return from(scores + i, valid); });
    for (int64_t i = 0; i < size; i++) y[i] = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < size; i++) y[i] += scores[t] * values[t * size + i];
    for (int64_t i = 0; i < size; i++) y[i] /= total;
}

// `tokens` tokens behind the `before` that the cache holds: x (sequences, tokens, width) in place.
// own, other: (any, depth, 2, size), the rotary table from the first of them on, for queries and keys. keys, values:
// (depth, sequences, heads, capacity, size), or null where a token is a sequence of its own.
void transformer(const Block* blocks, int64_t depth, const float* norm, int64_t heads, int64_t width, float* x,
                 int64_t sequences, int64_t tokens, const float* own, const float* other, float* keys,
                 float* values, int64_t capacity, int64_t before, int32_t threads) {
    const int64_t size = width / heads, hidden = blocks[0].mlp_out.inputs, rows = sequences * tokens;
    float* normed = room<struct Between, float>(rows * (2 * width + std::max(3 * width, 3 * hidden)) + sequences * heads * (before + tokens));
    float *y = normed + rows * width, *wide = y + rows * width, *narrow = wide + rows * 2 * hidden;
    float* scores = wide + rows * std::max(3 * width, 3 * hidden);
    for (int64_t layer = 0; layer < depth; layer++) {
        const Block& block = blocks[layer];
        for (int64_t r = 0; r < rows; r++) rms_norm(x + r * width, block.attention_norm, normed + r * width, width);
        product(block.qkv, normed, wide, rows, threads);
        // A head of a sequence, its tokens one after the other.
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
                    attend(q, all_keys, all_values, seen + 1, size, scores + k * (before + tokens),
                           y + row * width + column);
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

// What the head predicts for (rows, state) at one time: y (rows, state). states: those of `given` rows, which repeat.
// modulated: (rows, all modulations), as pra/generate/prepared.py lays them out.
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
            each(width, y, [=](int64_t i, int64_t valid) {
                return silu(from(times + k * width + i, valid) + from(condition + r * width + i, valid));
            });
}

// A hash of size numbers: each lane's of its own, folded at the end. For telling whether weights have changed.
uint64_t hash(const void* numbers, int64_t size) {
    constexpr int64_t TOGETHER = 4;  // multiplications take turns
    Words sums[TOGETHER] = {};
    const char* from = static_cast<const char*>(numbers);
    int64_t i = 0;
    for (; i + TOGETHER * LANES <= size; i += TOGETHER * LANES)
        for (int64_t k = 0; k < TOGETHER; k++)
            sums[k] = sums[k] * 0x9E3779B1u + *reinterpret_cast<const Words*>(from + (i + k * LANES) * sizeof(uint32_t));
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

// 0, or 1 where memory is short: no exception may reach a caller who is not C++.
template <class Work>
int32_t done(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

int32_t pra_product(const Linear* linear, const float* x, float* y, int64_t rows, int32_t threads) {
    return done([=] { product(*linear, x, y, rows, threads); });
}

int32_t pra_transformer(const Block* blocks, int64_t depth, const float* norm, int64_t heads, int64_t width, float* x,
                        int64_t sequences, int64_t tokens, const float* own, const float* other, float* keys,
                        float* values, int64_t capacity, int64_t before, int32_t threads) {
    return done([=] {
        transformer(blocks, depth, norm, heads, width, x, sequences, tokens, own, other, keys, values, capacity, before,
                    threads);
    });
}

int32_t pra_head(const HeadBlock* blocks, int64_t depth, const Linear* state_in, const Linear* out, const float* states,
                 int64_t given, int64_t rows, const float* modulated, int64_t stride, float* y, int32_t threads) {
    return done([=] { head(blocks, depth, state_in, out, states, given, rows, modulated, stride, y, threads); });
}

int32_t pra_context(const float* times, int64_t count, const float* condition, int64_t rows, int64_t width, float* y) {
    return done([=] { context(times, count, condition, rows, width, y); });
}

uint64_t pra_hash(const void* numbers, int64_t size) { return hash(numbers, size); }

}  // extern "C"
