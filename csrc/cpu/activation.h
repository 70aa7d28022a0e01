// The activations as function objects: value(z), and gradient(dy, saved) = dy act'(z)
// where saved is y for those whose derivative y determines, z for the rest; leaky_relu takes either where its slope is not negative.
// The codes are those of dlkernels/ops/activations.py, of which linear offers the first EPILOGUES.
// Any GEMM epilogue can apply one to a row of a tile; any reader can form dz with one.
#pragma once
#include "math.h"
#include "simd.h"

enum Code { NONE, RELU, GELU, GELU_TANH, LEAKY_RELU, SIGMOID, TANH, SILU, EPILOGUES, ELU = EPILOGUES, SOFTPLUS, CODES };

// Far out, where the result would be subnormal, it is 0 at once: numbers below the normal range cost the CPU a hundred cycles each.
template <class T> constexpr T SIGMOID_TAIL = sizeof(T) == 8 ? 708 : 87;
template <class T> constexpr T NORMAL_TAIL = sizeof(T) == 8 ? 37 : 12.5;

template <class T> inline vec<T> sigmoid_or_0(vec<T> z) {
    const vec<T> low = set(-SIGMOID_TAIL<T>), high = set(SIGMOID_TAIL<T>);
    vec<T> y = reciprocal<T>(1 + exp_normal<T>(-min(high, max(low, z))));  // min and max return their second argument for NaN
    return z < low ? vec<T>{} : y;
}
template <class T> inline vec<T> cdf_or_0(vec<T> z) {
    const vec<T> low = set(-NORMAL_TAIL<T>), high = set(NORMAL_TAIL<T>);
    return z < low ? vec<T>{} : gauss_cdf<T>(min(high, max(low, z)));
}
template <class T> inline vec<T> pdf_or_0(vec<T> z) {
    const vec<T> high = set(NORMAL_TAIL<T>), t = abs(z);
    return t > high ? vec<T>{} : gauss_pdf<T>(min(high, t));
}

template <class T> inline vec<T> softplus_or_0(vec<T> z) {
    const vec<T> low = set(-SIGMOID_TAIL<T>);
    return z < low ? vec<T>{} : softplus<T>(max(low, z));
}

struct Activation {
    int code;
    double a = 0, b = 0;  // slope of leaky_relu, alpha of elu, beta and threshold of softplus

    // Evaluating these once for every product that reads dz would cost more than writing dz down.
    bool costly() const { return code == GELU || code == GELU_TANH || code == SILU; }

    // f(value, gradient) with the pair of functions that `code` names; T is float or double.
    template <class T, class F> void with(const F& f) const {
        using V = vec<T>;
        const V zero{}, one = set(T(1)), half = set(T(0.5)), a = set(T(this->a));
        switch (code) {
            case NONE: return f([](V z) { return z; }, [](V d, V) { return d; });
            // z < 0 rather than max(z, 0): a NaN passes through
            case RELU: return f([=](V z) { return z < zero ? zero : z; }, [=](V d, V y) { return y <= zero ? zero : d; });
            case LEAKY_RELU: return f([=](V z) { return z > zero ? z : z * a; }, [=](V d, V z) { return z > zero ? d : d * a; });
            case SIGMOID: return f([](V z) { return sigmoid_or_0<T>(z); }, [=](V d, V y) { return d * y * (one - y); });
            case TANH: return f([](V z) { return tanh<T>(z); }, [=](V d, V y) { return d * (one - y * y); });
            case SILU:
                return f([](V z) { return z * sigmoid_or_0<T>(z); }, [=](V d, V z) {
                    V s = sigmoid_or_0<T>(z);
                    return d * s * (one + z * (one - s));
                });
            case ELU:
                return f([=](V z) { return z > zero ? z : a * expm1_negative<T>(z); },
                         [=](V d, V y) { return y > zero ? d : d * (y + a); });
            case SOFTPLUS: {  // log(1 + e^(beta z)) / beta, and z itself where beta z > threshold
                const V threshold = set(T(b)), scale = set(T(1 / this->a));
                return f([=](V z) { return z * a > threshold ? z : softplus_or_0<T>(z * a) * scale; },
                         [=](V d, V z) { return z * a > threshold ? d : d * sigmoid_or_0<T>(z * a); });
            }
            case GELU:
                if constexpr (sizeof(T) == 4)  // 0 z: as in Phi(z) + z phi(z), an infinite z has no derivative
                    return f([](V z) { return z * gelu_cdf(z); }, [](V d, V z) { return d * (gelu_gradient(z) + 0 * z); });
                else return f([](V z) { return z * cdf_or_0<T>(z); }, [](V d, V z) { return d * (cdf_or_0<T>(z) + z * pdf_or_0<T>(z)); });
            case GELU_TANH: {  // z/2 (1 + tanh u),  u = sqrt(2/pi) (z + 0.044715 z^3)
                const V c = set(T(0.79788456080286535588)), d = set(T(0.044715));
                return f([=](V z) { return half * z * (one + tanh<T>(c * (z + d * z * z * z))); }, [=](V g, V z) {
                    V t = tanh<T>(c * (z + d * z * z * z));
                    return g * half * ((one + t) + z * (one - t * t) * c * (one + T(3) * d * z * z));
                });
            }
        }
    }

    // The same where much would be compiled once for every activation: all but the commonest are called.
    template <class T, class F> void with_few(const F& f) const {
        using V = vec<T>;
        const V zero{};
        switch (code) {
            case NONE: return f([](V z) { return z; }, [](V d, V) { return d; });
            case RELU: return f([=](V z) { return z < zero ? zero : z; }, [=](V d, V y) { return y <= zero ? zero : d; });
            default: return f([this](V z) { return called_value<T>(z); }, [this](V d, V saved) { return called_slope<T>(d, saved); });
        }
    }
    template <class T> __attribute__((noinline)) vec<T> called_value(vec<T> z) const {
        with<T>([&](auto f, auto) { z = f(z); });
        return z;
    }
    template <class T> __attribute__((noinline)) vec<T> called_slope(vec<T> dy, vec<T> saved) const {
        with<T>([&](auto, auto f) { dy = f(dy, saved); });
        return dy;
    }

    // y = act(sums + bias), and z = sums + bias where it is asked for; bias and z may be null.
    template <class S, class T> void apply(const S* sums, const T* bias, T* y, T* z, int n) const {
        with<S>([=](auto value, auto) {
            for (int j = 0; j < n; j += VL<S>) {
                vec<S> v = load(sums + j, n - j);
                if (bias) v += load(bias + j, n - j);
                if (z) store(z + j, v, n - j);
                store(y + j, value(v), n - j);
            }
        });
    }

    // dz = dy * act'(saved)
    template <class T, class E> void gradient(const T* dy, const T* saved, E* dz, int n) const {
        using S = compute_t<T>;
        if (code == NONE) {
            for (int j = 0; j < n; j += VL<S>) store(dz + j, load(dy + j, n - j));
            return;
        }
        with<S>([=](auto, auto f) {
            for (int j = 0; j < n; j += VL<S>) store(dz + j, f(load(dy + j, n - j), load(saved + j, n - j)));
        });
    }
};
