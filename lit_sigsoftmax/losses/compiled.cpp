// The elementwise part of the loss in one pass over each row: logits in, loss and gradient out (see compiled.py).

#include <vector>

#include "bfloat16.h"
#include "interpreter.h"

namespace {

constexpr int64_t kBlock = 1024;  // sums are float32 within a block, so that they vectorise, and float64 across

float largest(const float* row, int64_t columns) {
    float peak = row[0];
#pragma omp simd reduction(max : peak)
    for (int64_t j = 0; j < columns; ++j) {
        const float z = row[j];  // not std::max: its references keep the compiler from vectorising
        peak = z > peak ? z : peak;
    }
    return peak;
}

// The sum of g(z) / g(peak); where asked for, row becomes g'(z) / g(peak).
template <bool kDifferentiate, class Evaluator>
double total(Evaluator& evaluator, float* row, int64_t columns, float peak) {
    const auto at = evaluator.at(peak);
    double sum = 0;
    for (int64_t start = 0; start < columns; start += kBlock)
        sum += evaluator.template of_row<kDifferentiate>(at, row + start, std::min(kBlock, columns - start));
    return sum;
}

template <bool kDifferentiate, class Evaluator>
float score_row(Evaluator& evaluator, float* row, int64_t columns, int64_t target) {
    const float peak = largest(row, columns);
    const float z = row[target];
    const double sum = total<kDifferentiate>(evaluator, row, columns, peak);
    if (kDifferentiate) {
        const float scale = static_cast<float>(1 / sum);
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) row[j] *= scale;
        row[target] -= static_cast<float>(evaluator.slope(z));
    }
    return evaluator.loss(sum, peak, z);
}

template <class Evaluator>
void score_rows(const Program* program, float* logits, const int64_t* target, float* nll, int64_t rows, int64_t columns,
                bool differentiate, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Evaluator evaluator(program);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) {
            float* row = logits + i * columns;
            nll[i] = differentiate ? score_row<true>(evaluator, row, columns, target[i])
                                   : score_row<false>(evaluator, row, columns, target[i]);
        }
    }
}

// Some rows of bfloat16, each given to visit in float32 with its index, in a buffer of the thread.
template <class Evaluator, class Visit>
void for_each_row(const Program* program, const uint16_t* logits, int64_t rows, int64_t columns, int threads,
                  Visit visit) {
#pragma omp parallel num_threads(threads)
    {
        Evaluator evaluator(program);
        std::vector<float> row(columns);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) row[j] = from_bfloat16(logits[i * columns + j]);
            visit(evaluator, i, row.data());
        }
    }
}

// The same for logits that come in bands of the vocabulary, columns from `first` on, in bfloat16. First the sums of
// g(z) / g(peak) as both grow from band to band, and the target's logit, ...
template <class Evaluator>
void add_band(const Program* program, const uint16_t* logits, const int64_t* target, float* peak, double* sum,
              float* of_target, int64_t rows, int64_t columns, int64_t first, int threads) {
    for_each_row<Evaluator>(program, logits, rows, columns, threads, [=](Evaluator& evaluator, int64_t i, float* row) {
        const float higher = std::max(peak[i], largest(row, columns));
        if (higher > peak[i]) {
            if (sum[i] > 0) sum[i] *= evaluator.ratio(peak[i], higher);
            peak[i] = higher;
        }
        const int64_t place = target[i] - first;
        if (place >= 0 && place < columns) of_target[i] = row[place];
        sum[i] += total<false>(evaluator, row, columns, higher);
    });
}

// ... then the losses, ...
template <class Evaluator>
void bands_losses(const Program* program, const float* peak, const double* sum, const float* of_target, float* nll,
                  int64_t rows) {
    Evaluator evaluator(program);
    for (int64_t i = 0; i < rows; ++i) nll[i] = evaluator.loss(sum[i], peak[i], of_target[i]);
}

// ... and, with what these have come to, the derivative of each row's loss, times the row's weight.
template <class Evaluator>
void differentiate_band(const Program* program, uint16_t* logits, const int64_t* target, const float* peak,
                        const double* sum, const float* row_weight, int64_t rows, int64_t columns, int64_t first,
                        int threads) {
    for_each_row<Evaluator>(program, logits, rows, columns, threads, [=](Evaluator& evaluator, int64_t i, float* row) {
        const int64_t place = target[i] - first;
        const bool here = place >= 0 && place < columns;
        const double slope = here ? evaluator.slope(row[place]) : 0;
        total<true>(evaluator, row, columns, peak[i]);
        if (here) row[place] -= static_cast<float>(slope * sum[i]);
        const float scale = static_cast<float>(row_weight[i] / sum[i]);
        for (int64_t j = 0; j < columns; ++j) logits[i * columns + j] = to_bfloat16(row[j] * scale);
    });
}

}  // namespace

#define SERVE(before, after, Evaluator)                                                                               \
    extern "C" void before##rows##after(const Program* program, float* logits, const int64_t* target, float* nll,     \
                                        int64_t rows, int64_t columns, int differentiate, int threads) {              \
        score_rows<Evaluator>(program, logits, target, nll, rows, columns, differentiate != 0, threads);              \
    }                                                                                                                 \
    extern "C" void before##add_band##after(const Program* program, const uint16_t* logits, const int64_t* target,    \
                                            float* peak, double* sum, float* of_target, int64_t rows,                 \
                                            int64_t columns, int64_t first, int threads) {                            \
        add_band<Evaluator>(program, logits, target, peak, sum, of_target, rows, columns, first, threads);            \
    }                                                                                                                 \
    extern "C" void before##bands_losses##after(const Program* program, const float* peak, const double* sum,         \
                                                const float* of_target, float* nll, int64_t rows, int) {              \
        bands_losses<Evaluator>(program, peak, sum, of_target, nll, rows);                                            \
    }                                                                                                                 \
    extern "C" void before##differentiate_band##after(                                                                \
        const Program* program, uint16_t* logits, const int64_t* target, const float* peak, const double* sum,        \
        const float* row_weight, int64_t rows, int64_t columns, int64_t first, int threads) {                         \
        differentiate_band<Evaluator>(program, logits, target, peak, sum, row_weight, rows, columns, first,           \
                                        threads);                                                                     \
    }

FOR_EACH_ACTIVATION(SERVE)

// The names of the operations, in the order of their numbers.
#define DO(name, value) #name " "
extern "C" const char* operations() { return FOR_EACH_OPERATION(DO); }
#undef DO

// Whether a program makes of some logits what is expected, up to rounding.
extern "C" int reproduces(const Program* program, const float* logits, const float* score, const float* slope,
                          int64_t count) {
    const auto near = [](float found, float expected) {
        return found == expected || (found != found && expected != expected) ||
               (std::isfinite(expected) && std::fabs(found - expected) <= 1e-4f + 1e-4f * std::fabs(expected));
    };
    Machine machine(*program);
    for (int64_t start = 0; start < count; start += Machine::kSize) {
        const int64_t n = std::min(Machine::kSize, count - start);
        machine.run(logits + start, n, true);
        for (int64_t i = 0; i < n; ++i)
            if (!near(machine.score()[i], score[start + i]) || !near(machine.slope()[i], slope[start + i])) return 0;
    }
    return 1;
}
