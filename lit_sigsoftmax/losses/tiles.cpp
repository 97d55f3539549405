// The loss of a chunk of few rows with its three matrix products, by tiles of the vocabulary (see compiled.py).
//
// A library's products take few rows badly: they read and write as much as the weight for little arithmetic. Here the
// logits lie transposed, (V, rows), so that rows are the lanes of the processor's vectors and the weight is read as it
// lies, and each tile of them is multiplied into both gradients while it is in the cache.

#include <omp.h>

#include <limits>
#include <vector>

#include "bfloat16.h"
#include "interpreter.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 5, kVectors = 5;  // 25 sums, 5 factors and one more: 31 of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4, kVectors = 3;  // 12, 3 and 1: 16 of 16
#else
constexpr int kLanes = 4, kRows = 5, kVectors = 5;  // as the first, for Neon
#endif
constexpr int64_t kTile = 60;    // types, a multiple of kRows: their logits stay in the first-level cache
constexpr int64_t kDepth = 100;  // of a product at a time, for the same reason

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Numbers that begin at a vector's alignment: a vector across two lines of the cache is loaded twice.
class Aligned {
   public:
    explicit Aligned(int64_t count) : vectors((count + kLanes - 1) / kLanes) {}
    float* data() { return reinterpret_cast<float*>(vectors.data()); }

   private:
    std::vector<Vector> vectors;
};

int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// A matrix read by rows and columns, whatever its strides.
struct Strided {
    const float* data;
    int64_t row, column;
};

// c = b a, or c += b a, for kRowCount rows and kVectorCount vectors of columns, summed in registers.
template <int kRowCount, int kVectorCount>
void multiply(const float* a, int64_t a_row, Strided b, int64_t depth, float* c, int64_t c_row, bool add) {
    Vector sum[kRowCount][kVectorCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectorCount; ++v)
            sum[r][v] = add ? Vector(*reinterpret_cast<const Unaligned*>(c + r * c_row + v * kLanes)) : Vector{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector factor[kVectorCount];
#pragma GCC unroll 8
        for (int v = 0; v < kVectorCount; ++v)
            factor[v] = *reinterpret_cast<const Unaligned*>(a + k * a_row + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRowCount; ++r) {
            const float other = b.data[r * b.row + k * b.column];
#pragma GCC unroll 8
            for (int v = 0; v < kVectorCount; ++v) sum[r][v] += factor[v] * other;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectorCount; ++v) *reinterpret_cast<Unaligned*>(c + r * c_row + v * kLanes) = sum[r][v];
}

template <int kVectorCount>
void multiply_rows(const float* a, int64_t a_row, Strided b, int64_t rows, int64_t depth, float* c, int64_t c_row,
                   bool add) {
    const auto from = [b](int64_t r) { return Strided{b.data + r * b.row, b.row, b.column}; };
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
        multiply<kRows, kVectorCount>(a, a_row, from(r), depth, c + r * c_row, c_row, add);
    for (; r < rows; ++r) multiply<1, kVectorCount>(a, a_row, from(r), depth, c + r * c_row, c_row, add);
}

// The columns of a product, in panels of up to kVectors vectors. The last panel ends where the columns end, so that no
// vector reaches beyond: what it shares with the one before is zero in a.
struct Panels {
    int64_t columns, vectors, step;
    explicit Panels(int64_t columns) : columns(columns), vectors(padded(columns) / kLanes) {
        const int64_t count = (vectors + kVectors - 1) / kVectors;
        step = (vectors + count - 1) / count;
    }
    int64_t count(int64_t first) const { return std::min(step, vectors - first); }
    int64_t start(int64_t first) const {
        return first + step < vectors ? first * kLanes : columns - count(first) * kLanes;
    }
};

// c (rows, columns) = b (rows, depth) a (depth, columns), or c += b a; a's columns are those of the panels. Where they
// are no multiple of kLanes it must be the sum: what the last panel shares would be overwritten.
void product(const float* a, Strided b, int64_t rows, int64_t depth, float* c, int64_t columns, bool add) {
    const Panels panels(columns);
    const int64_t a_row = panels.vectors * kLanes;
    for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t part = std::min(kDepth, depth - k);
        const Strided of_part = {b.data + k * b.column, b.row, b.column};
        for (int64_t first = 0; first < panels.vectors; first += panels.step) {
            const auto go = [&](auto multiply) {
                multiply(a + k * a_row + first * kLanes, a_row, of_part, rows, part, c + panels.start(first), columns,
                         add || k > 0);
            };
            switch (panels.count(first)) {
                case 1: go(multiply_rows<1>); break;
                case 2: go(multiply_rows<2>); break;
                case 3: go(multiply_rows<3>); break;
                case 4: go(multiply_rows<4>); break;
                default: go(multiply_rows<5>);
            }
        }
    }
}

// A matrix of float32 or bfloat16, read as it is or rounded to bfloat16.
struct Matrix {
    const void* data;
    int64_t columns;
    bool is_bfloat16, rounded;

    // Some of its rows in float32, in the buffer unless they lie so.
    const float* rows(int64_t first, int64_t count, Aligned& buffer) const {
        const float* const source = static_cast<const float*>(data) + first * columns;
        if (!is_bfloat16 && !rounded) return source;
        const uint16_t* const half = static_cast<const uint16_t*>(data) + first * columns;
        float* const out = buffer.data();
        if (is_bfloat16) {
            for (int64_t i = 0; i < count * columns; ++i) out[i] = from_bfloat16(half[i]);
        } else {
            for (int64_t i = 0; i < count * columns; ++i) out[i] = from_bfloat16(to_bfloat16(source[i]));
        }
        return out;
    }

    // What rows() needs to be given for so many.
    Aligned buffer(int64_t count) const { return Aligned(is_bfloat16 || rounded ? count * columns : 0); }
};

struct Layer {
    Matrix weight;
    const float* bias;  // or null
    int64_t vocab_size;
    int threads;

    int64_t size() const { return weight.columns; }
    int64_t tiles() const { return (vocab_size + kTile - 1) / kTile; }
    int64_t types(int64_t tile) const { return std::min(kTile, vocab_size - tile * kTile); }
};

// What the gradients of a step are written to; null is not wanted.
struct Gradients {
    float *rows, *weight, *bias;
};

// What is used again for each chunk; its width is the rows, padded.
struct Buffers {
    Aligned logits;  // (V, width), then their derivatives
    Aligned rows;    // packed: transposed (size, width), then scaled (count, padded size)
    Aligned sums;    // of each thread, of the rows' gradient: (size, width)
    Aligned peaks;   // of each thread: (width)
    std::vector<double> totals;
    std::vector<float> scale;

    Buffers(const Layer& layer, int64_t count, bool of_rows)
        : logits(layer.vocab_size * padded(count)),
          rows(std::max(layer.size() * padded(count), count * padded(layer.size()))),
          sums(of_rows ? layer.threads * layer.size() * padded(count) : 0),
          peaks(layer.threads * padded(count)),
          totals(layer.threads * padded(count)),
          scale(count) {}
};

// Losses of a chunk's rows, and their logits' derivatives, which are still to be multiplied by buffers.scale.
template <class Evaluator>
void score(const Program* program, const Layer& layer, const float* rows, const int64_t* target, const float* row_weight,
           int64_t count, float* nll, Buffers& buffers) {
    const int64_t size = layer.size(), width = padded(count);
    float *const logits = buffers.logits.data(), *const transposed = buffers.rows.data();
    for (int64_t k = 0; k < size; ++k)
        for (int64_t i = 0; i < width; ++i) transposed[k * width + i] = i < count ? rows[i * size + k] : 0.0f;
    std::vector<typename Evaluator::At> at;
    std::vector<float> peak(width), of_target(count);
#pragma omp parallel num_threads(layer.threads)
    {
        Evaluator evaluator(program);
        float* const own_peak = buffers.peaks.data() + omp_get_thread_num() * width;
        double* const own_total = buffers.totals.data() + omp_get_thread_num() * width;
        std::fill(own_peak, own_peak + width, -std::numeric_limits<float>::infinity());
        std::fill(own_total, own_total + width, 0.0);
        Aligned buffer = layer.weight.buffer(kTile), of_tile(width);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < layer.tiles(); ++t) {
            const int64_t first = t * kTile, types = layer.types(t);
            const float* const weight = layer.weight.rows(first, types, buffer);
            product(transposed, {weight, size, 1}, types, size, logits + first * width, width, false);
            for (int64_t v = first; v < first + types; ++v) {
                float* const z = logits + v * width;
                const float shift = layer.bias ? layer.bias[v] : 0.0f;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    z[i] += shift;
                    own_peak[i] = z[i] > own_peak[i] ? z[i] : own_peak[i];
                }
            }
        }
#pragma omp single
        {
            for (int64_t i = 0; i < width; ++i) {
                peak[i] = buffers.peaks.data()[i];
                for (int t = 1; t < omp_get_num_threads(); ++t)
                    peak[i] = std::max(peak[i], buffers.peaks.data()[t * width + i]);
                at.push_back(evaluator.at(peak[i]));
            }
            for (int64_t i = 0; i < count; ++i) of_target[i] = logits[target[i] * width + i];
        }
        float* const sum = of_tile.data();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < layer.tiles(); ++t) {
            std::fill(sum, sum + width, 0.0f);
            evaluator.of_lanes(at.data(), logits + t * kTile * width, layer.types(t), width, sum);
            for (int64_t i = 0; i < width; ++i) own_total[i] += sum[i];
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            double total = 0;
            for (int t = 0; t < omp_get_num_threads(); ++t) total += buffers.totals[t * width + i];
            nll[i] = evaluator.loss(total, peak[i], of_target[i]);
            buffers.scale[i] = static_cast<float>(row_weight[i] / total);
            logits[target[i] * width + i] -= static_cast<float>(evaluator.slope(of_target[i]) * total);
        }
    }
}

// From the derivatives that score() has left to the gradients: those of weight and bias are sums over the chunks.
void differentiate(const Layer& layer, const float* rows, int64_t count, const Gradients& gradients, bool first_chunk,
                   Buffers& buffers) {
    const int64_t size = layer.size(), width = padded(count), scaled_row = padded(size);
    const float *const derivative = buffers.logits.data(), *const scale = buffers.scale.data();
    float *const scaled = buffers.rows.data(), *const sums = buffers.sums.data();
    const Panels panels(size);
    for (int64_t first = 0; gradients.weight && first < panels.vectors; first += panels.step)
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < panels.count(first) * kLanes; ++j) {
                const int64_t k = panels.start(first) + j;
                const float number = k < first * kLanes ? 0.0f : rows[i * size + k] * scale[i];
                scaled[i * scaled_row + first * kLanes + j] = number;
            }
#pragma omp parallel num_threads(layer.threads)
    {
        float* const own_sum = gradients.rows ? sums + omp_get_thread_num() * size * width : nullptr;
        if (own_sum) std::fill(own_sum, own_sum + size * width, 0.0f);
        Aligned buffer = layer.weight.buffer(kTile);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < layer.tiles(); ++t) {
            const int64_t first = t * kTile, types = layer.types(t);
            const float* const tile = derivative + first * width;
            if (own_sum)
                product(tile, {layer.weight.rows(first, types, buffer), 1, size}, size, types, own_sum, width, true);
            if (float* const of_types = gradients.weight ? gradients.weight + first * size : nullptr) {
                if (first_chunk) std::fill(of_types, of_types + types * size, 0.0f);
                product(scaled, {tile, width, 1}, types, count, of_types, size, true);
            }
            for (int64_t v = 0; gradients.bias && v < types; ++v) {
                float sum = first_chunk ? 0.0f : gradients.bias[first + v];
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < count; ++i) sum += tile[v * width + i] * scale[i];
                gradients.bias[first + v] = sum;
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (own_sum ? count : 0); ++i)
            for (int64_t k = 0; k < size; ++k) {
                float sum = 0;
                for (int t = 0; t < omp_get_num_threads(); ++t) sum += sums[(t * size + k) * width + i];
                gradients.rows[i * size + k] = sum * scale[i];
            }
    }
}

template <class Evaluator>
void losses_and_gradients(const Program* program, const Layer& layer, const Matrix& rows, const int64_t* target,
                          const float* row_weight, int64_t count, int64_t chunk, float* nll,
                          const Gradients& gradients) {
    Buffers buffers(layer, std::min(chunk, count), gradients.rows != nullptr);
    Aligned buffer = rows.buffer(chunk);
    for (int64_t start = 0; start < count; start += chunk) {
        const int64_t n = std::min(chunk, count - start);
        const float* const of_chunk = rows.rows(start, n, buffer);
        score<Evaluator>(program, layer, of_chunk, target + start, row_weight + start, n, nll + start, buffers);
        float* const of_rows = gradients.rows ? gradients.rows + start * layer.size() : nullptr;
        differentiate(layer, of_chunk, n, {of_rows, gradients.weight, gradients.bias}, start == 0, buffers);
    }
}

}  // namespace

#define SERVE(before, after, Evaluator)                                                                               \
    extern "C" void before##tiles##after(const Program* program, const void* rows, int rows_bfloat16,                 \
                                         const void* weight, int weight_bfloat16, int rounded, const float* bias,     \
                                         const int64_t* target, const float* row_weight, float* nll, float* of_rows,  \
                                         float* of_weight, float* of_bias, int64_t count, int64_t size,               \
                                         int64_t vocab_size, int64_t chunk, int threads) {                            \
        const Matrix hidden = {rows, size, rows_bfloat16 != 0, rounded != 0};                                         \
        const Layer layer = {{weight, size, weight_bfloat16 != 0, rounded != 0}, bias, vocab_size, threads};          \
        losses_and_gradients<Evaluator>(program, layer, hidden, target, row_weight, count, chunk, nll,                \
                                          {of_rows, of_weight, of_bias});                                             \
    }

FOR_EACH_ACTIVATION(SERVE)

// Whether hidden vectors of this size are served: the last panel must not begin before the first column.
extern "C" int tiles_take(int64_t size) { return size > 0 && Panels(size).start(0) >= 0; }
