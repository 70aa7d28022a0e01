// exp, log, tanh, sigmoid, elu, softplus, erf and the normal distribution on vectors: arithmetic and selects, no branch, no table look-up.
//
//   vec<float> y = exp<float>(x);         also log, tanh, sigmoid, elu, softplus, erf, gauss_cdf, gauss_pdf; and all of them for double
//
// Each function does what a textbook does by hand: an identity moves the argument into a short interval, a polynomial serves there, and
// the identity is undone. NaN gives NaN, -0 stays -0 where the function is odd, infinities give the limits, and no result is flushed to 0.
//
// Polynomials are minimax: the Remez exchange in 60-digit arithmetic (tests/remez.py prints every table below), then rounded.
//
// Largest error over the whole range, in ulp (the spacing of the numbers around the exact result), on every instruction set:
//                float  double
//     exp           1.2     1.2
//     log           1.0     1.0
//     tanh          3.0     3.0
//     sigmoid       3.0     3.0
//     elu           2.0     2.0
//     softplus      2.5     2.5
//     erf           1.5     1.5
//     gauss_cdf     5.0     7.0    relative, also where Phi(x) is as small as 1e-300: so is x Phi(x), the gelu
//     gauss_pdf     3.0     3.0
// tests/test_math.py reads this table and holds the functions to it.
#pragma once
#include "simd.h"

template <class T> struct coefficients;

template <> struct coefficients<float> {
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float smallest_normal = 0x1p-126f;
    static constexpr float exp_low = -104, exp_high = 89, tanh_high = 10, gauss_high = 14.5;  // beyond these the result is its limit
    static constexpr float ln2_high = 0x1.62e4p-1, ln2_low = 0x1.7f7d1cp-20;  // ln 2 as a sum; high has 15 bits, so its multiples are exact
    // (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2: relative error of e^r 2^-28.0
    static constexpr float exp[] = {0.499999943f, 0.166665267f, 0.0416682811f, 0.00836818406f, 0.00138174070f};
    // (2^r - 1) / r on |r| <= 1/2: relative error of 2^r 2^-28.8
    static constexpr float exp2[] = {0.693147202f, 0.240226479f, 0.0555033286f, 0.00961844114f, 0.00133988341f, 0.000153524194f};
    // (log((1 + s) / (1 - s)) - 2s) / s^3 in s^2 on |s| <= 3 - 2 sqrt 2: relative error of the logarithm 2^-37
    static constexpr float log[] = {0.666666658f, 0.400003011f, 0.285391349f, 0.235517916f};
    // erf(x) / x - 1 in x^2 on |x| <= 1: relative error 2^-29.7
    static constexpr float erf[] = {0.128379166f, -0.376126271f, 0.112836002f, -0.0268544456f, 0.00518953646f, -0.000802084570f,
                                    7.88911916e-5f};
    // (t + 2c) e^(t^2/2) Phi(-t) in v = (t - c) / (t + 2c), c = 2, on 0 <= t <= 14.5: relative error 2^-26.8
    static constexpr float mills_centre = 2;
    static constexpr float mills[] = {1.00861201f, -1.24996614f, 1.09500376f, -0.645213823f, 0.206317153f, 0.0108961560f,
                                      -0.0348758127f, 0.00422343907f, 0.00574626245f, -0.00175769207f};
    // (Phi(x) - 1/2) / x and ((x Phi(x))' - 1/2) / x in x^2 - limit^2/2 on |x| <= limit: errors of what is above x 2^-25.65 and 2^-25.03
    static constexpr float gelu_limit = 5.3, gelu_gradient_limit = 5.8;
    static constexpr float gelu[] = {0.133392563f, -0.00473609870f, 0.000249739728f, -1.42892151e-5f, 8.24404732e-7f, -4.62897907e-8f,
                                     2.46564368e-9f, -1.22299105e-10f, 5.82977731e-12f, -2.75116076e-13f, 1.05012003e-14f,
                                     -2.60982125e-16f, 1.24004758e-17f, -9.24385990e-19f, 2.44452533e-20f};
    static constexpr float gelu_gradient[] = {0.121998775f, -0.00366572362f, 0.000171911687f, -9.70813887e-6f, 6.26699405e-7f,
                                              -4.28710717e-8f, 2.87429983e-9f, -1.82938612e-10f, 1.08907029e-11f, -5.59678499e-13f,
                                              2.41200546e-14f, -1.19887657e-15f, 6.82399139e-17f, -2.07340042e-18f, 2.41017391e-21f,
                                              -1.19809953e-21f, 1.78823265e-22f, -4.24575751e-24f};
};

template <> struct coefficients<double> {
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double smallest_normal = 0x1p-1022;
    static constexpr double exp_low = -746, exp_high = 710, tanh_high = 20, gauss_high = 39;
    static constexpr double ln2_high = 0x1.62e42fefa2p-1, ln2_low = 0x1.9ef35793c7673p-41;  // high has 40 bits
    // as above; relative error 2^-57.4
    static constexpr double exp[] = {0.50000000000000051, 0.16666666666666456, 0.041666666666571109, 0.0083333333334828105,
                                     0.0013888888934007066, 0.00019841269507449936, 2.4801502133491999e-5, 2.7557601159171721e-6,
                                     2.7627299131080591e-7, 2.4991747234780273e-8};
    // as above; relative error 2^-57.9
    static constexpr double exp2[] = {0.69314718055994533, 0.24022650695910131, 0.055504108664820096, 0.0096181291075942205,
                                      0.0013333558146774725, 0.00015403530457161002, 1.5252733492036637e-5, 1.3215435189647549e-6,
                                      1.0178200051959518e-7, 7.0738087838626736e-9, 4.4347246915856128e-10};
    // as above; relative error 2^-59
    static constexpr double log[] = {0.66666666666666987, 0.39999999999614494, 0.28571428703138927, 0.22222202227015985,
                                     0.18183389022327908, 0.15318242129550255, 0.14756396981560486};
    // as above; relative error 2^-57
    static constexpr double erf[] = {0.12837916709551257, -0.37612638903183547, 0.11283791670945253, -0.026866170643276218,
                                     0.0052239776074234678, -0.00085483259896967580, 0.00012055295320494294, -1.4924744663335490e-5,
                                     1.6447517677871874e-6, -1.6209175911748696e-7, 1.3722976265924503e-8, -7.8011888740977516e-10};
    // as above with c = 3 on 0 <= t <= 39; relative error 2^-55.9
    static constexpr double mills_centre = 3;
    static constexpr double mills[] = {1.0936255352000595, -1.6928097269143812, 2.1957131480286369, -2.3999346835434741,
                                       2.2049005160950073, -1.6828062609090551, 1.0392687817718946, -0.49042358700808889,
                                       0.15094315564156043, -0.0088006312958212047, -0.018101489613334394, 0.0080533350503028650,
                                       0.00041768354975775360, -0.0014902104354466701, 0.00024958153313571764, 0.00023466725936309794,
                                       -8.0751055345519887e-5, -3.9425717296341356e-5, 2.1529818462902897e-5, 6.1084058174136878e-6,
                                       -6.2109880482493253e-6, 1.2154735208408009e-6};
};

template <class T> using bits = vec<std::make_unsigned_t<ints<T>>>;
template <class T> inline bits<T> sign(vec<T> x) { return bits_as<bits<T>>(x) & bits_as<bits<T>>(set<T>(T(-0.0))); }
template <class T> inline vec<T> magnitude(vec<T> x) { return bits_as<vec<T>>(bits_as<bits<T>>(x) ^ sign<T>(x)); }
template <class T> inline vec<T> with_sign_of(vec<T> x, vec<T> y) { return bits_as<vec<T>>(bits_as<bits<T>>(y) | sign<T>(x)); }  // y >= +0

// c[0] + c[1] x + c[2] x^2 + ... by Horner's rule.
template <class T, int n> inline vec<T> polynomial(const T (&c)[n], vec<T> x) {
    vec<T> y = set<T>(c[n - 1]);
#pragma GCC unroll 32
    for (int i = n - 2; i >= 0; i--) y = y * x + c[i];
    return y;
}

// ---- the exponential family ------------------------------------------------------------------------------------------------------

// x - y = n ln 2 + r with n an integer and |r| <= ln(2) / 2, so that e^(x - y) = 2^n e^r. y is a small correction to x.
// n appears by adding a number so large that the spacing of its neighbours is 1: the low bits of the sum are n, with BIASES times the
// exponent bias added where the use wants it. n * ln2_high and the first difference are exact, with or without fused multiply-add.
template <class T> struct reduced { vec<T> r; bits<T> n; };
template <class T, int BIASES> inline reduced<T> reduce(vec<T> x, vec<T> y = vec<T>{}) {
    using C = coefficients<T>;
    constexpr T log2e = T(1.44269504088896340736), round = T(3LL << (C::mantissa - 1)) + BIASES * C::bias;
    vec<T> shifted = (x - y) * log2e + round, n = shifted - round;
    return {x - n * C::ln2_high - n * C::ln2_low - y, bits_as<bits<T>>(shifted)};
}

// 2^(e - bias) from the low bits of e, which become the exponent field.
template <class T> inline vec<T> exponent(bits<T> e) { return bits_as<vec<T>>(e << coefficients<T>::mantissa); }

// e^r - 1 = r + r^2 Q(r), nowhere cancelling.
template <class T> inline vec<T> expm1_reduced(vec<T> r) { return r + r * r * polynomial(coefficients<T>::exp, r); }

// e^(x - y) for |y| much smaller than |x|. 2^n is multiplied in as two halves, each a normal number, so the product overflows, underflows
// and rounds to subnormals by itself where e^x does. The clamps keep n in range; min and max return their second argument for NaN.
template <class T> inline vec<T> exp(vec<T> x, vec<T> y = vec<T>{}) {
    using C = coefficients<T>;
    x = min(set<T>(C::exp_high), max(set<T>(C::exp_low), x));
    auto [r, n] = reduce<T, 2>(x, y);
    bits<T> half = n >> 1;
    return (1 + expm1_reduced<T>(r)) * exponent<T>(half) * exponent<T>(n - half);
}

// e^x where it is a normal number, as the caller knows: 2^n is added to the exponent.
template <class T> inline vec<T> exp_normal(vec<T> x) {
    auto [r, n] = reduce<T, 0>(x);
    return bits_as<vec<T>>(bits_as<bits<T>>(1 + expm1_reduced<T>(r)) + (n << coefficients<T>::mantissa));
}

// 2^x for x up to some 100, but 0 where it is no normal number: two thirds of e^x, for what comes with a factor of its own. NaN for NaN.
template <class T> inline vec<T> exp2_or_zero(vec<T> x) {
    using C = coefficients<T>;
    constexpr T round = T(3LL << (C::mantissa - 1)) + C::bias;
    vec<T> shifted = x + round, r = x - (shifted - round);
    return x < T(1 - C::bias) ? vec<T>{} : (1 + r * polynomial(C::exp2, r)) * exponent<T>(bits_as<bits<T>>(shifted));
}

// e^x - 1 for x <= 0: 2^n (e^r - 1) + (2^n - 1). Near 0 nothing cancels, far out it is -1.
template <class T> inline vec<T> expm1_negative(vec<T> x) {
    auto [r, n] = reduce<T, 1>(max(set<T>(-2 * coefficients<T>::tanh_high), x));
    vec<T> s = exponent<T>(n);
    return s * expm1_reduced<T>(r) + (s - 1);
}

// tanh |x| = -m / (m + 2) with m = e^(-2|x|) - 1.
template <class T> inline vec<T> tanh(vec<T> x) {
    vec<T> m = expm1_negative<T>(-2 * magnitude<T>(x));
    return with_sign_of<T>(x, magnitude<T>(m) / (m + 2));
}

// x where it is positive, else e^x - 1.
template <class T> inline vec<T> elu(vec<T> x) { return x > 0 ? x : expm1_negative<T>(x); }

// 1 / (1 + e^-x) = e^x / (1 + e^x): with z = e^-|x| <= 1 nothing overflows, and the left tail keeps its relative accuracy.
template <class T> inline vec<T> sigmoid(vec<T> x) {
    vec<T> z = exp<T>(-magnitude<T>(x));
    return (x < 0 ? z : set<T>(1)) / (1 + z);
}

// ---- the logarithm ---------------------------------------------------------------------------------------------------------------

// log(1 + f) + e ln 2 for sqrt(1/2) <= 1 + f < sqrt 2: with s = f / (2 + f)
//     log(1 + f) = log((1 + s) / (1 - s)) = 2s + s^3 R(s^2) = f - (f^2/2 - s (f^2/2 + s^2 R)),
// where the last form has f, which is exact, as its leading term (the classical scheme of Sun's fdlibm).
template <class T> inline vec<T> log_near_1(vec<T> f, vec<T> e) {
    using C = coefficients<T>;
    vec<T> s = f / (2 + f), z = s * s, half_square = f * f * T(0.5);
    vec<T> tail = s * (half_square + z * polynomial(C::log, z)) + e * C::ln2_low;
    return e * C::ln2_high + (f - (half_square - tail));
}

// x = 2^e (1 + f).
template <class T> inline vec<T> log(vec<T> x) {
    using C = coefficients<T>;
    constexpr T infinity = T(__builtin_inf()), two_to_mantissa = T(1LL << C::mantissa);
    vec<T> lifted = x < C::smallest_normal ? x * two_to_mantissa : x;  // a subnormal number gets its exponent back

    bits<T> one = bits_as<bits<T>>(set<T>(1)), root = bits_as<bits<T>>(set<T>(T(0.70710678118654752440)));
    bits<T> u = bits_as<bits<T>>(lifted) + (one - root), biased = u >> C::mantissa;
    vec<T> f = bits_as<vec<T>>((u - (biased << C::mantissa)) + root) - 1;
    vec<T> e = bits_as<vec<T>>(biased | bits_as<bits<T>>(set<T>(two_to_mantissa))) - (two_to_mantissa + C::bias);  // integer to T
    e = x < C::smallest_normal ? e - C::mantissa : e;

    vec<T> y = log_near_1<T>(f, e);
    y = x < infinity ? y : x;  // infinity and NaN
    return x > 0 ? y : x == 0 ? set<T>(-infinity) : set<T>(T(__builtin_nan("")));
}

// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x| <= 1, where 1 + u is halved if it is beyond sqrt 2.
template <class T> inline vec<T> softplus(vec<T> x) {
    vec<T> u = exp<T>(-magnitude<T>(x)), zero{}, one = set<T>(1);
    auto large = u > T(0.41421356237309504880);
    return (x > 0 ? x : zero) + log_near_1<T>(large ? (u - one) * T(0.5) : u, large ? one : zero);
}

// ---- the normal distribution -----------------------------------------------------------------------------------------------------

// e^(-t^2/2). Rounding t^2 would cost t^2/2 ulp, so t = h + l with h short enough for an exact square: t^2 = h^2 + (t - h)(t + h).
template <class T> inline vec<T> gauss(vec<T> t) {
    using C = coefficients<T>;
    t = min(set<T>(C::gauss_high), t);
    vec<T> h = bits_as<vec<T>>(bits_as<bits<T>>(t) >> (C::mantissa / 2 + 1) << (C::mantissa / 2 + 1));
    return exp<T>(h * h * T(-0.5), (t - h) * (t + h) * T(0.5));
}

// e^(t^2/2) Phi(-t) for t >= 0: Mills' ratio over sqrt(2 pi), smooth and slowly falling like 1/t.
template <class T> inline vec<T> mills(vec<T> t) {
    constexpr T c = coefficients<T>::mills_centre;
    t = min(set<T>(coefficients<T>::gauss_high), t);
    vec<T> scale = 1 / (t + 2 * c);
    return polynomial(coefficients<T>::mills, (t - c) * scale) * scale;
}

// Phi(x): the tail below -|x| is e^(-x^2/2) Mills(|x|), and Phi(x) = 1 - Phi(-x).
template <class T> inline vec<T> gauss_cdf(vec<T> x) {
    vec<T> t = magnitude<T>(x), tail = gauss<T>(t) * mills<T>(t);
    return x < 0 ? tail : 1 - tail;
}

// Phi'(x) = e^(-x^2/2) / sqrt(2 pi).
template <class T> inline vec<T> gauss_pdf(vec<T> x) { return gauss<T>(magnitude<T>(x)) * T(0.39894228040143267794); }

// Phi(x) and (x Phi(x))' of floats for the gelu, without an exponential: within 6e-7 everywhere, but not relative to the tail, which ends
// in 0.
template <int n> inline vec<float> odd_step(const float (&c)[n], float limit, vec<float> x) {
    const vec<float> low = set(-limit), high = set(limit), a = min(high, max(low, x));
    vec<float> y = 0.5f + a * polynomial(c, a * a - limit * limit / 2);
    return x < low ? vec<float>{} : y;
}
inline vec<float> gelu_cdf(vec<float> x) { return odd_step(coefficients<float>::gelu, coefficients<float>::gelu_limit, x); }
inline vec<float> gelu_gradient(vec<float> x) {
    return odd_step(coefficients<float>::gelu_gradient, coefficients<float>::gelu_gradient_limit, x);
}

// |x| < 1: x + x E(x^2). Else 1 - 2 Phi(-sqrt2 |x|), which no longer cancels.
template <class T> inline vec<T> erf(vec<T> x) {
    vec<T> a = magnitude<T>(x), t = a * T(1.41421356237309504880);
    vec<T> near = a + a * polynomial(coefficients<T>::erf, a * a);
    vec<T> far = 1 - 2 * exp<T>(-(min(set<T>(coefficients<T>::gauss_high), a) * a)) * mills<T>(t);
    return with_sign_of<T>(x, a < 1 ? near : far);
}
