// Output activations as the compiled loss takes them: g and its derivative for every logit, log g exact for the target.
//
// Plain functions that the compiler vectorises for the machine it runs on: no intrinsics, no PyTorch headers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kNegligible = 64;  // e^-64 is 1e-28: what is further below the peak weighs nothing in float32

// e^r for |r| <= ln 2 / 2: a minimax polynomial.
inline float exp_polynomial(float r) {
    float p = 1.38145406e-3f;
    p = p * r + 8.36874545e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    return p * (r * r) + r + 1.0f;
}

// x = n ln 2 + r
struct Reduced {
    static constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    float shifted, n, r;
    explicit Reduced(float x)
        : shifted(x * 1.44269504f + kShifter),
          n(shifted - kShifter),
          r((x - n * 0.693359375f) + n * 2.12194440e-4f) {}
};

// e^x for x <= 64 within 1.5 units in the last place, 0 for x < -64.
inline float exp_or_zero(float x) {
    const Reduced reduced(x);
    float p = exp_polynomial(reduced.r);
    uint32_t exponent, bits;
    std::memcpy(&exponent, &reduced.shifted, sizeof bits);
    std::memcpy(&bits, &p, sizeof bits);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof bits);
    return x < -kNegligible ? 0.0f : p;
}

inline float exp_clamped(float x) { return std::exp(std::clamp(x, -kNegligible, kNegligible)); }

// g(z) and g'(z), both divided by g(peak), where peak is the row's largest logit and g does not decrease.
struct Relative {
    float value, derivative;
};

// An output activation: at(z) for every logit, and log g and its derivative, exact, for the one that is the target.

struct Softmax {  // g = e^z
    float peak;
    explicit Softmax(float peak) : peak(peak) {}
    Relative at(float z) const {
        const float g = exp_or_zero(z - peak);
        return {g, g};
    }
    static double log_g(double z) { return z; }
    static double slope(double) { return 1; }
};

// log of 1 / (1 + e^-z), and e^-z / (1 + e^-z)
inline double log_sigmoid(double z) { return std::min(z, 0.0) - std::log1p(std::exp(-std::fabs(z))); }
inline double sigmoid_of_minus(double z) { return std::exp(log_sigmoid(-z)); }

struct Sigsoftmax {  // g = e^z sigmoid(z). One exponential: sigmoid(z) = e^(z - peak) / (e^(z - peak) + e^-peak)
    float peak, base;
    explicit Sigsoftmax(float peak) : peak(peak), base(exp_clamped(-peak)) {}
    Relative at(float z) const {
        const float e = exp_or_zero(z - peak);
        const float reciprocal = 1.0f / (e + base);
        const float g = e * (e * reciprocal * (1.0f + base));
        return {g, g + g * (base * reciprocal)};
    }
    static double log_g(double z) { return z + log_sigmoid(z); }
    static double slope(double z) { return 1 + sigmoid_of_minus(z); }
};

struct Sigmoid {  // g = sigmoid(z), like above but relative to a shift: g is flat above 0
    float shift, base, scale;
    explicit Sigmoid(float peak)
        : shift(std::min(peak, 0.0f)), base(exp_clamped(-shift)), scale(1.0f + base * exp_clamped(shift - peak)) {}
    Relative at(float z) const {
        const float e = exp_or_zero(std::min(z - shift, kNegligible));
        const float reciprocal = 1.0f / (e + base);
        const float g = e * reciprocal * scale;
        return {g, g * (base * reciprocal)};
    }
    static double log_g(double z) { return log_sigmoid(z); }
    static double slope(double z) { return sigmoid_of_minus(z); }
};

struct Relu {  // g = max(z, 0) + 1e-8
    static constexpr float floor = 1e-8f;
    float scale;
    explicit Relu(float peak) : scale(1.0f / (std::max(peak, 0.0f) + floor)) {}
    Relative at(float z) const { return {((z <= 0 ? 0.0f : z) + floor) * scale, z > 0 ? scale : 0.0f}; }
    static double log_g(double z) { return std::log(std::max(z, 0.0) + floor); }
    static double slope(double z) { return z > 0 ? 1 / (z + floor) : 0; }
};

// One of them as the passes over logits take it; Interpreted (interpreter.h) is the other kind. Each thread has its own.
template <class Activation>
class BuiltIn {
   public:
    using At = Activation;
    explicit BuiltIn(const struct Program*) {}

    At at(float peak) const { return At(peak); }
    double ratio(float peak, float higher) const {  // of g
        return std::exp(Activation::log_g(peak) - Activation::log_g(higher));
    }
    double slope(float z) const { return Activation::slope(z); }
    // Of a row: total is its sum of g(z) / g(peak), z the target's logit.
    float loss(double total, float peak, float z) const {
        return static_cast<float>(std::log(total) + (Activation::log_g(peak) - Activation::log_g(z)));
    }

    // The sum of g(z) / g(peak) of some logits of a row; where asked for, they become g'(z) / g(peak).
    template <bool kDifferentiate>
    float of_row(const At& at, float* z, int64_t count) const {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; ++j) {
            const Relative relative = at.at(z[j]);
            sum += relative.value;
            if (kDifferentiate) z[j] = relative.derivative;
        }
        return sum;
    }

    // The same for types of the vocabulary whose logits for all rows lie side by side.
    void of_lanes(const At* at, float* z, int64_t types, int64_t width, float* sum) const {
        for (int64_t v = 0; v < types; ++v, z += width) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                const Relative relative = at[i].at(z[i]);
                sum[i] += relative.value;
                z[i] = relative.derivative;
            }
        }
    }
};

}  // namespace

// What comes before and after the names of its functions, which is how they are found by the registered name, and who
// takes it.
#define FOR_EACH_ACTIVATION(SERVE)           \
    SERVE(, _softmax, BuiltIn<Softmax>)       \
    SERVE(, _sigsoftmax, BuiltIn<Sigsoftmax>) \
    SERVE(, _sigmoid, BuiltIn<Sigmoid>)       \
    SERVE(, _relu, BuiltIn<Relu>)             \
    SERVE(program_, , Interpreted)
