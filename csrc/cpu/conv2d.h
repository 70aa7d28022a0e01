// Convolution as products: which filters meet which images, and where the sums go. No matrix of patches is written down.
//
//   forward   y[o, j]      = sum_k weight[o, k] x[k, j]          k = (c, r, s) at places j of y
//   dx        dx[c, j]     = sum_k weight[c, k] dz[k, j]         k = (o, r, s) at pixels j of x: a bank for each remainder by the stride
//   dweight   dweight[o,k] = sum_j dz[o, j] x[k, j]              over all places j, in parts that are added in order
//
// Filters of one pixel and machines with AMX take patches.h, many small images stacked.h, all others slide.h or, where it is asked for and
// pays, winograd.h.
#pragma once
#include "patches.h"
#include "slide.h"
#include "stacked.h"
#include "winograd.h"

template <class T> using direct_micro = std::conditional_t<HAS_PAIR_DOT && std::is_same_v<T, bf16>, PairDot<bf16>, Fma<compute_t<T>>>;

template <class T> constexpr bool ON_TILES = HAS_TILES && sizeof(T) < 8;  // of AMX
template <class T> constexpr bool IN_SQUARES = !ON_TILES<T> && std::is_same_v<direct_micro<T>, Fma<compute_t<T>>>;  // pairs are as fast
template <class T> constexpr bool IN_STACKS = !ON_TILES<T> && std::is_same_v<T, compute_t<T>>;

// Whether images are better laid side by side: few pixels each, images that fill vectors, and more products saved than Winograd would save.
inline bool is_small(const Geometry& s) {
    bool matrix = s.R * s.S * s.stride[0] * s.stride[1] == 1;
    if (s.H * s.W > 64 || s.P * s.Q > 64 || matrix || !fills_tiles<float>(s.N)) return false;
    Axis h = s.axis(0), w = s.axis(1);
    if (!s.winograd || !is_3x3(h, w)) return true;
    return h.met() * w.met() <= 20 * ceil_div(s.P, 2) * ceil_div(s.Q, 2);  // a square takes 16 products, and its transforms
}

// Whether dweight is summed over all images at once, for which they are brought into channels last.
template <class T> bool has_few_places(const Geometry& s) {
    return IN_STACKS<T> && s.C1 >= Fma<compute_t<T>>::NR && s.N * s.P * s.Q <= 2048 && is_small(s);
}

template <class T, Memory MEMORY>
void filter(const Geometry& s, const Filters<T>& filters, const Images<T, MEMORY>& images, const std::vector<Bank<T, MEMORY>>& banks) {
    int64_t groups = s.groups;
    if constexpr (IN_STACKS<T>)
        if (is_small(s)) return Stacked<T, MEMORY>{groups, filters, images, banks}.run();
    if constexpr (IN_SQUARES<T>)
        if (s.winograd && banks.size() == 1 && is_3x3(banks[0].h, banks[0].w) && fills_tiles<T>(filters.M) && images.channels >= 16)
            if (Winograd<T, MEMORY>{groups, filters, images, banks[0]}.run()) return;
    bool matrix = MEMORY == Memory::ROWS && banks.size() == 1 && Patches<T, MEMORY>{images, banks[0].h, banks[0].w}.is_matrix();
    if (!ON_TILES<T> && !matrix) return slide<direct_micro<T>>(groups, filters, images, banks);
    for (const auto& bank : banks) multiply_patches(groups, filters, images, bank);
}

inline std::vector<int64_t> count(int64_t n) {
    std::vector<int64_t> all(n);
    for (int64_t i = 0; i < n; i++) all[i] = i;
    return all;
}

template <class T, Memory MEMORY>
void forward(const Geometry& s, const T* x, const T* weight, const T* bias, Activation act, T* y, T* z) {
    int64_t taps = s.R * s.S;
    Bank<T, MEMORY> bank{s.axis(0), s.axis(1), count(s.R), count(s.S), s.S, {y, z, bias, act, s.O, s.P, s.Q, s.P, s.Q, s.Q}};
    bank.result.to = Destination(y, s.N * s.O * s.P * s.Q * int64_t(sizeof(T)));
    Filters<T> filters{weight, s.O1, s.O1 * s.C1 * taps, s.C1 * taps, s.to_channel, s.to_tap, taps};
    filter<T, MEMORY>(s, filters, {x, s.N, s.C1, s.C, s.H, s.W}, {bank});
}

// The taps of one dimension that reach pixels first, first + stride, ... of the input, and where they then lie in the output.
struct Reach {
    std::vector<int64_t> taps, at;
    Reach(int64_t count, int64_t stride, int64_t before, int64_t dilation, int64_t first) {
        for (int64_t t = count; t-- > 0;) {
            int64_t distance = first + before - t * dilation;
            if (distance % stride == 0) taps.push_back(t), at.push_back(distance / stride);
        }
    }
};

// Pixels whose coordinates leave the same remainders, divided by the strides, are reached by the same taps: a bank for each remainder.
template <class T, Memory MEMORY> void input_gradient(const Geometry& s, const T* dz, const T* weight, const T* bias, T* dx) {
    int64_t taps = s.R * s.S;
    std::vector<Bank<T, MEMORY>> banks;
    for (int64_t a = 0; a < std::min(s.stride[0], s.H); a++)
        for (int64_t b = 0; b < std::min(s.stride[1], s.W); b++) {
            Reach h(s.R, s.stride[0], s.before[0], s.dilation[0], a), w(s.S, s.stride[1], s.before[1], s.dilation[1], b);
            int64_t I = ceil_div(s.H - a, s.stride[0]), L = ceil_div(s.W - b, s.stride[1]);
            Result<T, MEMORY> result{dx, nullptr, bias, {NONE}, s.C, s.H, s.W, I, L, L, s.stride[0], s.stride[1], a, b};
            banks.emplace_back(Axis{s.P, I, 1, h.at}, Axis{s.Q, L, 1, w.at}, h.taps, w.taps, s.S, result);
        }
    Filters<T> filters{weight, s.C1, s.O1 * s.C1 * taps, s.to_channel, s.C1 * taps, s.to_tap, taps};
    if (!banks.empty()) filter<T, MEMORY>(s, filters, {dz, s.N, s.O1, s.O, s.P, s.Q}, banks);
}
