// Any elementwise output activation, as a program of PyTorch's elementwise operations (see programs.py).
//
// Each step is done for a block of logits that stays in the first-level cache, so that finding out which one it is
// costs nothing.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "activations.h"

namespace {

// Functions that the compiler vectorises, within some units in the last place.

inline float power_of_two(int32_t n) {  // -126 <= n <= 127
    const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

inline float exponential(float x) {
    const float within = x > 90.0f ? 90.0f : x > -110.0f ? x : -110.0f;
    const Reduced reduced(within);
    const int32_t whole = static_cast<int32_t>(reduced.n), half = whole >> 1;
    return x != x ? x : exp_polynomial(reduced.r) * power_of_two(half) * power_of_two(whole - half);
}

inline float logarithm(float x) {  // Cephes' polynomial
    const bool small = x < 1.17549435e-38f;
    const float scaled = small ? x * 8388608.0f : x;
    uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    // The mantissa in [sqrt(1/2), sqrt(2)), and its exponent.
    const uint32_t shifted = bits - 0x3f3504f3u;
    const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
    const uint32_t mantissa = (shifted & 0x7fffffu) + 0x3f3504f3u;
    float m;
    std::memcpy(&m, &mantissa, sizeof m);
    m -= 1.0f;
    const float e = static_cast<float>(exponent - (small ? 23 : 0)), square = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const float of_finite = (p * m * square - e * 2.12194440e-4f - 0.5f * square) + m + e * 0.693359375f;
    const float infinity = std::numeric_limits<float>::infinity();
    const float of_positive = x == infinity ? infinity : of_finite;
    return x > 0.0f ? of_positive : x == 0.0f ? -infinity : std::numeric_limits<float>::quiet_NaN();
}

inline float logarithm_of_one_plus(float x) {
    const float sum = 1.0f + x;
    const float lost = x - (sum - 1.0f);  // by rounding
    const float whole = logarithm(sum);
    return sum > 0.0f && sum < 1e30f ? whole + lost / sum : whole;
}

inline float hyperbolic_tangent(float x) {  // Cephes' polynomial near zero
    const float size = std::fabs(x), s = x * x;
    float p = -5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    const float near_zero = p * s * x + x;
    const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return size < 0.625f ? near_zero : x < 0 ? -far : far;
}

inline float exponential_minus_one(float x) {
    const float t = hyperbolic_tangent(0.5f * x);
    return std::fabs(x) < 1.0f ? 2.0f * t / (1.0f - t) : exponential(x) - 1.0f;
}

// NaN where either is, as PyTorch has it. Here and below, & and | for && and ||: a branch would keep the compiler from
// vectorising.
inline float smaller(float a, float b) {
    return !(a >= b) & (b == b) ? a : b;
}
inline float larger(float a, float b) {
    return !(a <= b) & (b == b) ? a : b;
}
inline float logistic(float x) {
    const float e = exponential(-std::fabs(x)), r = 1 / (1 + e);
    return x < 0 ? e * r : r;
}
inline float log_logistic(float x) {
    return smaller(x, 0.0f) - logarithm_of_one_plus(exponential(-std::fabs(x)));
}

// The operations, by the names and with the arguments a, b, c, d of PyTorch's; a truth value is 1 or 0.
#define FOR_EACH_OPERATION(DO)                                                   \
    DO(add, a + b)                                                               \
    DO(sub, a - b)                                                               \
    DO(rsub, b - a)                                                              \
    DO(mul, a * b)                                                               \
    DO(div, a / b)                                                               \
    DO(neg, -a)                                                                  \
    DO(reciprocal, 1 / a)                                                        \
    DO(abs, std::fabs(a))                                                        \
    DO(sgn, float(a > 0) - float(a < 0))                                         \
    DO(square, a * a)                                                            \
    DO(cube, a * a * a)                                                          \
    DO(sqrt, std::sqrt(a))                                                       \
    DO(rsqrt, 1 / std::sqrt(a))                                                  \
    DO(exp, exponential(a))                                                      \
    DO(expm1, exponential_minus_one(a))                                          \
    DO(log, logarithm(a))                                                        \
    DO(log1p, logarithm_of_one_plus(a))                                          \
    DO(tanh, hyperbolic_tangent(a))                                              \
    DO(tanh_backward, a * (1 - b * b))                                           \
    DO(sigmoid, logistic(a))                                                     \
    DO(sigmoid_backward, a * b * (1 - b))                                        \
    DO(log_sigmoid_forward, log_logistic(a))                                     \
    DO(log_sigmoid_backward, a * logistic(-b))                                   \
    DO(silu, a * logistic(a))                                                    \
    DO(silu_backward, a * logistic(b) * (1 + b * logistic(-b)))                  \
    DO(softplus, a * b > c ? a : logarithm_of_one_plus(exponential(a * b)) / b)  \
    DO(softplus_backward, b * c > d ? a : a * logistic(b * c))                   \
    DO(relu, larger(a, 0.0f))                                                    \
    DO(threshold_backward, b <= c ? 0.0f : a)                                    \
    DO(leaky_relu, a > 0 ? a : a * b)                                            \
    DO(leaky_relu_backward, b > 0 ? a : a * c)                                   \
    DO(hardtanh, smaller(larger(a, b), c))                                       \
    DO(hardtanh_backward, (b <= c) | (b >= d) ? 0.0f : a)                        \
    DO(clamp, smaller(larger(a, b), c))                                          \
    DO(clamp_min, larger(a, b))                                                  \
    DO(clamp_max, smaller(a, b))                                                 \
    DO(minimum, smaller(a, b))                                                   \
    DO(maximum, larger(a, b))                                                    \
    DO(eq, float(a == b))                                                        \
    DO(ne, float(a != b))                                                        \
    DO(lt, float(a < b))                                                         \
    DO(le, float(a <= b))                                                        \
    DO(gt, float(a > b))                                                         \
    DO(ge, float(a >= b))                                                        \
    DO(logical_and, float((a != 0) & (b != 0)))                                  \
    DO(logical_or, float((a != 0) | (b != 0)))                                   \
    DO(logical_not, float(a == 0))                                               \
    DO(where, a != 0 ? b : c)                                                    \
    DO(masked_fill, b != 0 ? c : a)

#define DO(name, value) kOperation_##name,
enum Operation : int32_t { FOR_EACH_OPERATION(DO) };
#undef DO

struct Step {
    int32_t operation, out, a, b, c, d;  // of registers; arguments that it does not take are 0
};

// From logits, in register 0, and constants, in the next ones, to log g and its derivative.
struct Program {
    const Step* steps;
    const float* constants;
    int32_t steps_to_score, steps_to_slope, constant_count, register_count, score, slope;
};

class Machine {
   public:
    static constexpr int64_t kSize = 256;  // logits at a time

    explicit Machine(const Program& program) : program(program), registers(program.register_count * kSize) {
        for (int32_t k = 0; k < program.constant_count; ++k)
            std::fill_n(&registers[(k + 1) * kSize], kSize, program.constants[k]);
    }

    // Up to kSize logits; they must stay where they are while the results are read.
    void run(const float* z, int64_t count, bool to_slope) {
        logits = z;
        const Step* const end = program.steps + (to_slope ? program.steps_to_slope : program.steps_to_score);
        for (const Step* step = program.steps; step != end; ++step) {
            float* const out = &registers[step->out * kSize];
            const float *const a_ = at(step->a), *const b_ = at(step->b), *const c_ = at(step->c),
                        *const d_ = at(step->d);
            switch (step->operation) {
#define DO(name, value)                                                          \
    case kOperation_##name:                                                      \
        _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) {                \
            [[maybe_unused]] const float a = a_[i], b = b_[i], c = c_[i], d = d_[i]; \
            out[i] = value;                                                      \
        }                                                                        \
        break;
                FOR_EACH_OPERATION(DO)
#undef DO
            }
        }
    }
    const float* score() const { return at(program.score); }
    const float* slope() const { return at(program.slope); }

   private:
    const float* at(int32_t place) const { return place ? &registers[place * kSize] : logits; }

    const Program& program;
    std::vector<float> registers;
    const float* logits = nullptr;
};

// What is relative to log g of the row's largest logit need not be small where g decreases. Beyond e^64 it is NaN, and so
// is the loss, for the caller to see. The target's score is float32 like the others, so that its rounding cancels.
class Interpreted {
    static constexpr double kTrusted = kNegligible - 4;  // log of a sum, which a band may have scaled since

   public:
    struct At {
        float shift;
    };
    explicit Interpreted(const Program* program) : machine(*program) {}

    At at(float peak) {  // finite, or -inf - -inf would make NaN of a masked logit beside others
        return {std::max(score(peak), std::numeric_limits<float>::lowest())};
    }
    double ratio(float peak, float higher) {  // of g
        return std::exp(static_cast<double>(at(peak).shift) - at(higher).shift);
    }
    double slope(float z) {
        machine.run(&z, 1, true);
        return *machine.slope();
    }
    float loss(double total, float peak, float z) {
        const double log_total = std::log(total);
        if (!(log_total < kTrusted)) return std::numeric_limits<float>::quiet_NaN();
        return static_cast<float>(log_total + (static_cast<double>(at(peak).shift) - score(z)));
    }

    template <bool kDifferentiate>
    float of_row(const At& at, float* z, int64_t count) {
        float sum = 0;
        for (int64_t start = 0; start < count; start += Machine::kSize) {
            const int64_t n = std::min(Machine::kSize, count - start);
            machine.run(z + start, n, kDifferentiate);
            const float *const score = machine.score(), *const slope = machine.slope();
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) {
                const float g = relative(score[i] - at.shift);
                sum += g;
                if (kDifferentiate) z[start + i] = g == 0 ? 0.0f : g * slope[i];
            }
        }
        return sum;
    }

    // The same for types of the vocabulary whose logits for all rows lie side by side.
    void of_lanes(const At* at, float* z, int64_t types, int64_t width, float* sum) {
        const int64_t lanes = std::min(width, Machine::kSize);
        const int64_t step = Machine::kSize / lanes;  // several types at once, where a block takes all rows
        for (int64_t first = 0; first < types; first += step)
            for (int64_t lane = 0; lane < width; lane += lanes) {
                const int64_t n = std::min(step, types - first), count = std::min(lanes, width - lane);
                machine.run(z + first * width + lane, n * count, true);
                for (int64_t v = 0; v < n; ++v) {
                    const float *const score = machine.score() + v * count, *const slope = machine.slope() + v * count;
                    float* const of_type = z + (first + v) * width + lane;
#pragma omp simd
                    for (int64_t i = 0; i < count; ++i) {
                        const float g = relative(score[i] - at[lane + i].shift);
                        sum[lane + i] += g;
                        of_type[i] = g == 0 ? 0.0f : g * slope[i];
                    }
                }
            }
    }

   private:
    float score(float z) {
        machine.run(&z, 1, false);
        return *machine.score();
    }
    static float relative(float x) {
        return x > kNegligible ? std::numeric_limits<float>::quiet_NaN() : exp_or_zero(x);
    }

    Machine machine;
};

}  // namespace
