// What a convolution's kernels share: the sizes of a call, images in memory, the taps that meet their pixels, and where results go.
//
//   place      a position of the filter: row i and column l of the result (or, for dx, one of its remainders modulo the stride)
//   Bank       filters that are slid over the same images: taps, what they meet, and the Result that their sums make
#pragma once
#include <vector>

#include "activation.h"
#include "channels.h"
#include "product.h"
#include "rows.h"

constexpr int TURNED = 8;  // scratch slot

template <class T> constexpr ScalarType scalar_type() {
    return std::is_same_v<T, double> ? ScalarType::Double : std::is_same_v<T, float> ? ScalarType::Float
         : std::is_same_v<T, bf16> ? ScalarType::BFloat16 : ScalarType::Half;
}
template <class T, class S> void put_one(T* to, S value) {
    if constexpr (sizeof(T) == 2) store(to, set(value), 1);
    else *to = value;
}

struct Axis {  // one dimension of the image
    int64_t size, places, step;
    std::vector<int64_t> at;           // where each tap lies when the filter is at place 0
    std::vector<int64_t> first, last;  // tap t meets a pixel at places [first[t], last[t])

    Axis(int64_t size, int64_t places, int64_t step, std::vector<int64_t> taps)
        : size(size), places(places), step(step), at(std::move(taps)), first(at.size()), last(at.size()) {
        auto reach = [&](int64_t pixel, int64_t least) {  // the first place from which a tap meets `pixel` or a later one
            return std::clamp(pixel <= 0 ? 0 : (pixel + step - 1) / step, least, places);
        };
        for (size_t t = 0; t < at.size(); t++) first[t] = reach(-at[t], 0), last[t] = reach(size - at[t], first[t]);
    }
    int64_t taps() const { return int64_t(at.size()); }
    int64_t met() const {  // pairs of a place and a tap that meet a pixel
        int64_t sum = 0;
        for (size_t t = 0; t < at.size(); t++) sum += last[t] - first[t];
        return sum;
    }
};

struct Geometry {  // of a call: what stride, padding (top, bottom, left, right) and dilation make of the sizes
    int64_t N, C, H, W, O, R, S, groups, P, Q, C1, O1;  // C1 and O1: channels of a group
    int64_t stride[2], before[2], dilation[2];
    int64_t to_channel, to_tap;  // from one to the next in the memory of the filters
    bool winograd = false;       // wherever it pays
    std::vector<int64_t> taps(int d) const {
        std::vector<int64_t> at(d ? S : R);
        for (size_t t = 0; t < at.size(); t++) at[t] = int64_t(t) * dilation[d] - before[d];
        return at;
    }
    Axis axis(int d) const { return {d ? W : H, d ? Q : P, stride[d], taps(d)}; }
    bool own_filters() const { return C1 == 1 && O1 == 1 && groups > 1; }
};

// n numbers, from T as it is stored to E as it is multiplied: whole vectors are written, those read stop at n.
template <class E, class T> INLINE inline void copy(E* to, const T* from, int64_t n) {
    if constexpr (std::is_same_v<E, T> && sizeof(T) == 2) {
        for (int64_t i = 0; i < n; i += VL<float>)
            store_raw(to + i, n - i >= VL<float> ? load_raw<halves>(from + i) : load_raw<halves>(from + i, int(n - i)));
    } else {
        constexpr int L = VL<compute_t<T>>;
        for (int64_t i = 0; i < n; i += L) store(to + i, load(from + i, int(std::min<int64_t>(L, n - i))));
    }
}
template <class E> INLINE inline void clear(E* to, int64_t n) {
    constexpr int L = VL<compute_t<E>>;
    for (int64_t i = 0; i < n; i += L) store(to + i, vec<compute_t<E>>{});
}
// Every second number: two vectors and one shuffle.
template <class E, class T> INLINE inline void copy_every(int64_t step, E* to, const T* from, int64_t n) {
    using C = compute_t<T>;
    constexpr int L = VL<C>;
    if (step == 1) return copy(to, from, n);
    if (step != 2) {
        for (int64_t i = 0; i < n; i++) store(to + i, load(from + i * step, 1), 1);
        return;
    }
    for (int64_t i = 0; i < n; i += L) {
        int64_t left = 2 * (n - i) - 1;
        vec<C> a = load(from + 2 * i, int(std::min<int64_t>(L, left))), b{};
        if (left > L) b = load(from + 2 * i + L, int(std::min<int64_t>(L, left - L)));
        store(to + i, evens(a, b, std::make_integer_sequence<int, L>{}));
    }
}
// The lower or upper half of v in the even lanes, `old` in the odd ones.
template <class V, int... L> INLINE inline V spread(V old, V v, bool upper, std::integer_sequence<int, L...>) {
    constexpr int n = int(sizeof...(L));
    if (upper) return __builtin_shufflevector(old, v, (L % 2 ? L : n + n / 2 + L / 2)...);
    return __builtin_shufflevector(old, v, (L % 2 ? L : n + L / 2)...);
}
// Every second number of memory becomes one of the first n lanes of v; those between stay.
template <class T> INLINE inline void store_evens(T* p, vec<compute_t<T>> v, int n) {
    constexpr int L = VL<compute_t<T>>;
    int count = 2 * n - 1;
    auto lanes = std::make_integer_sequence<int, L>{};
    store(p, spread(load(p, count), v, false, lanes), count);
    if (count > L) store(p + L, spread(load(p + L, count - L), v, true, lanes), count - L);
}

template <class T, Memory MEMORY> struct Images {  // the channels of one group
    const T* p;
    int64_t images, channels, all_channels, H, W;
    static constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;
    int64_t pixel() const { return COLUMNS ? all_channels : 1; }  // from a pixel to the next one
    int64_t channel() const { return COLUMNS ? 1 : H * W; }
    int64_t image() const { return all_channels * H * W; }
    Images group(int64_t g) const {
        Images one = *this;
        one.p += g * channels * channel();
        return one;
    }
};

struct Place { int64_t n, i, l; };  // image, row, column

// Where sums go: place (n, i, l) of channel m is pixel (i * step_h + first_h, l * step_w + first_w) of image n. The places of a tile follow
// one another along rows of `pitch` numbers, of which the first L are places.
template <class T, Memory MEMORY> struct Result {
    T *y, *z;  // z, the value before the activation, may be null
    const T* bias;
    Activation act;
    int64_t all_channels, H, W, I, L, pitch, step_h = 1, step_w = 1, first_h = 0, first_w = 0;
    Destination to{nullptr, 0};

    Result of_group(int64_t g, int64_t M) const {
        Result one = *this;
        int64_t offset = g * M * (MEMORY == Memory::COLUMNS ? 1 : H * W);
        one.y += offset, one.z = z ? z + offset : nullptr, one.bias = bias ? bias + g * M : nullptr;
        return one;
    }
    Place place(int64_t j) const { return {j / (I * pitch), j / pitch % I, j % pitch}; }

    // Bring the memory that part t of `parts` of a tile of places x channels will be written to into the caches.
    template <class S> void fetch(int64_t t, int64_t parts, Place at, const Tile<S>& tile) const {
        if (to.past_caches || W != L || step_h != 1) return;
        constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;
        int64_t rows = COLUMNS ? tile.rows : tile.columns, bytes = (COLUMNS ? tile.columns : tile.rows) * int64_t(sizeof(T)), pixel = at.i * L + at.l;
        T* first = y + (COLUMNS ? (at.n * H * W + pixel) * all_channels + tile.n : (at.n * all_channels + tile.n) * H * W + pixel);
        for (int64_t r = rows * t / parts; r < rows * (t + 1) / parts; r++)
            for (int64_t b = 0; b < bytes; b += 64)
                __builtin_prefetch(reinterpret_cast<char*>(first + r * (COLUMNS ? all_channels : H * W)) + b, 1, 3);
    }
    // A tile of channels x places, the first of them at `at`.
    template <class S> void write(const Tile<S>& t, Place at) const {
        each_run(at, t.columns, [&](int j, int run, int64_t n, int64_t pixel, const auto& put) {
            if constexpr (MEMORY == Memory::COLUMNS) write_columns(t, j, run, (n * H * W + pixel) * all_channels + t.m, put);
            else write_rows(t, j, run, (n * all_channels + t.m) * H * W + pixel, put);
        }, S{});
    }
    // A tile of places x channels.
    template <class S> void write_places(const Tile<S>& t, Place at) const {
        if constexpr (MEMORY == Memory::COLUMNS) {
            each_run(at, t.rows, [&](int i, int run, int64_t n, int64_t pixel, const auto& put) {
                write_pixels(t, i, run, (n * H * W + pixel) * all_channels + t.n, put);
            }, S{});
        } else {
            int64_t ld = round_up(t.rows, VL<S>) + VL<S>;
            S* rows = scratch<S, TURNED>(round_up(t.columns, VL<S>) * ld);
            turn(t.p, t.ld, t.rows, t.columns, rows, ld);
            write(Tile<S>{rows, ld, t.n, 0, t.columns, t.rows}, at);
        }
    }

  private:
    // f(number of the first, run, image, pixel, put) for runs of places whose pixels are step_w apart: rows or, where nothing lies between
    // them, whole images; put(v, at, lanes) finishes sums and stores them.
    template <class F, class S> void each_run(Place p, int count, const F& f, S) const {
        bool whole = pitch == L && step_h * step_w == 1;
        act.with_few<S>([&](auto value, auto) {
            // Copies, since a vector that is stored might be any member: the compiler would load them all again.
            auto put = [y = y, z = z, past_caches = to.past_caches, value](vec<S> v, int64_t at, int lanes) INLINE {
                if (z) store(z + at, v, lanes);
                if (past_caches) Destination::store_past(y + at, value(v), lanes);
                else store(y + at, value(v), lanes);
            };
            for (int j = 0; j < count;) {
                int64_t left = whole ? (I - p.i) * L - p.l : L - p.l, step = whole ? left : pitch - p.l;
                int run = int(std::min<int64_t>(count - j, left));
                if (run > 0) f(j, run, p.n, (p.i * step_h + first_h) * W + p.l * step_w + first_w, put);
                j += int(std::min<int64_t>(count - j, step));
                p.l = 0;
                if (whole || ++p.i == I) p.i = 0, p.n++;
            }
        });
    }
    template <class S, class Put> void write_rows(const Tile<S>& t, int j, int run, int64_t to, const Put& put) const {
        for (int i = 0; i < t.rows; i++, to += H * W) {
            const S* sums = t.p + i * t.ld + j;
            vec<S> b = bias ? set(S(load(bias + t.m + i, 1)[0])) : vec<S>{};
            int head = step_w == 1 ? int(-(reinterpret_cast<uintptr_t>(y + to) / sizeof(T)) % VL<S>) : 0;  // up to a whole vector's place
            for (int r = 0, n = head ? head : VL<S>; r < run; r += n, n = VL<S>) {
                n = std::min(n, run - r);
                put_in_row(load(sums + r, n) + b, to + r * step_w, n, put);
            }
        }
    }
    template <class S, class Put> void write_pixels(const Tile<S>& t, int i, int run, int64_t to, const Put& put) const {
        const S* sums = t.p + i * t.ld;
        const T* bias = this->bias ? this->bias + t.n : nullptr;
        int columns = t.columns, whole = columns / VL<S> * VL<S>;
        int64_t ld = t.ld, pixel = step_w * all_channels;
        for (; run > 0; run--, sums += ld, to += pixel) {
            for (int c = 0; c < whole; c += VL<S>) put(bias ? load(sums + c) + load(bias + c) : load(sums + c), to + c, VL<S>);
            if (int c = whole, lanes = columns - c; lanes > 0) {
                vec<S> v = load(sums + c, lanes);
                put(bias ? v + load(bias + c, lanes) : v, to + c, lanes);
            }
        }
    }
    // The first n lanes of v to a row, step_w apart; further apart than side by side they are of a gradient: no activation.
    template <class V, class Put> void put_in_row(V v, int64_t at, int n, const Put& put) const {
        if (step_w == 1) put(v, at, n);
        else if (step_w == 2) store_evens(y + at, v, n);
        else for (int r = 0; r < n; r++) put(set(v[r]), at + r * step_w, 1);
    }
    template <class S, class Put> void write_columns(const Tile<S>& t, int j, int run, int64_t to, const Put& put) const {
        constexpr int V = VL<S>;
        for (int i = 0; i < t.rows; i += V) {
            int rows = std::min(V, t.rows - i);
            vec<S> b = bias ? load(bias + t.m + i, rows) : vec<S>{};
            for (int r = 0; r < run; r += V) {
                int places = std::min(V, run - r);
                vec<S> square[V];
#pragma GCC unroll 16
                for (int s = 0; s < V; s++) square[s] = s < rows ? load(t.p + (i + s) * t.ld + j + r, places) : vec<S>{};
                transpose(square);
                for (int s = 0; s < places; s++) put(square[s] + b, to + (r + s) * step_w * all_channels + i, rows);
            }
        }
    }
};

// Tap (t, u) of a bank is number t * w.taps() + u of `taps`, which says where in a stored filter it lies.
template <class T, Memory MEMORY> struct Bank {
    Axis h, w;
    std::vector<int64_t> taps;
    Result<T, MEMORY> result;
    Bank(Axis h, Axis w, const std::vector<int64_t>& r, const std::vector<int64_t>& s, int64_t S, Result<T, MEMORY> result)
        : h(std::move(h)), w(std::move(w)), result(result) {
        for (int64_t a : r)
            for (int64_t b : s) taps.push_back(a * S + b);
    }
};

// Filters in memory: tap t of channel c of filter m of group g is p[g * sg + m * sm + c * sc + t * st].
template <class T> struct Filters {
    const T* p;
    int64_t M, sg, sm, sc, st, taps;
    // As rows [m][k] with the k in the order (c / inner, tap, c % inner), in `memory` if they do not lie so; channels that fill up the last
    // `inner` are 0.
    Matrix<T> arranged(int64_t g, int64_t C, const std::vector<int64_t>& taps, int64_t inner, T* memory) const {
        int64_t K = round_up(C, inner) * int64_t(taps.size());
        bool lie_so = inner == 1 && st == 1 && sc == int64_t(taps.size());
        for (int64_t t = 0; lie_so && t < sc; t++) lie_so = taps[t] == t;
        if (lie_so) return {const_cast<T*>(p) + g * sg, sm, 1};
        parallel(M, [&](int64_t m, int64_t end) {
            for (; m < end; m++) {
                T* to = memory + m * K;
                const T* from = p + g * sg + m * sm;
                for (int64_t c = 0; c < C; c += inner)
                    for (int64_t tap : taps) {
                        int64_t n = std::min(inner, C - c);
                        for (int64_t i = 0; i < n; i++) to[i] = from[(c + i) * sc + tap * st];
                        for (int64_t i = n; i < inner; i++) to[i] = T{};
                        to += inner;
                    }
            }
        }, M * K <= SERIAL_NUMBERS);
        return {memory, K, 1};
    }
};

// body(g, threads) for every group: the groups shared out to the threads, or all threads on each group in turn.
template <class Body> void each_group(int64_t groups, const Body& body) {
    int64_t all = threads();
    if (groups < 2 * all) {
        for (int64_t g = 0; g < groups; g++) body(g, all);
    } else {
        parallel(groups, [&](int64_t g, int64_t end) { for (; g < end; g++) body(g, 1); });
    }
}
