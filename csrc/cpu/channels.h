// Where the numbers of a channel lie, and how work on whole channels is cut: for batch normalisation and its like.
//
//   rows     (N, C, S) in memory: channel c is N runs of S numbers; a group is one channel
//   columns  (N, S, C) in memory, M = N S rows: a group is WIDTH = 4 vectors of neighbouring channels, one lane each
//
//   group    what one task normalises;   block   the fixed part of a group that one task sums;   piece   the part of a block whose numbers
//   stay in the L1 cache between two looks at them.  None of them depends on the number of threads, so neither does a sum.
//
// A kernel is two phases over (group, block) with a middle step per group: sums, what follows from them, and the map over the numbers.
#pragma once
#include <algorithm>
#include <vector>

#include "gemm_micro.h"
#include "op.h"
#include "rows.h"

enum class Memory { ROWS, COLUMNS };

template <class T, Memory MEMORY> struct Channels {
    using C = compute_t<T>;
    using V = vec<C>;
    static constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;
    static constexpr int QUAD = 4, L = VL<C>, WIDTH = QUAD * L, GROUP = COLUMNS ? WIDTH : 1;
    static constexpr int64_t PIECE = COLUMNS ? 64 : 4096, BLOCK = 8 * PIECE;
    int64_t N, channels, S;

    int64_t count() const { return N * S; }  // numbers of a channel
    int64_t groups() const { return (channels + GROUP - 1) / GROUP; }
    int64_t blocks() const { return (count() + BLOCK - 1) / BLOCK; }
    // From a number to one of the same channel that comes soon: another run, or some rows further. The hardware foresees neither.
    int64_t ahead() const { return COLUMNS ? 16 * channels : channels * S; }
    // Fetch for writing or reading what vector i of a line of WIDTH numbers will need: once per line of the cache.
    template <int WRITE = 0> INLINE static void fetch(int i, const T* p) {
        if (i % std::max<int>(1, 64 / (L * sizeof(T))) == 0) __builtin_prefetch(p, WRITE, 2);
    }
    int64_t padded() const { return groups() * GROUP; }

    // f(at, length) for runs of neighbouring numbers that make up numbers [begin, end) of every channel of group g.
    template <class F> INLINE void each_run(int64_t g, int64_t begin, int64_t end, const F& f) const {
        if constexpr (COLUMNS) {
            int64_t at = begin * channels + g * WIDTH, length = std::min<int64_t>(WIDTH, channels - g * WIDTH);
            for (int64_t m = begin; m < end; m++, at += channels) f(at, length);
        } else {
            for (int64_t i = begin, length; i < end; i += length) {
                int64_t n = i / S, s = i % S;
                length = std::min(S - s, end - i);
                f((n * channels + g) * S + s, length);
            }
        }
    }

    // f(i, at, lanes) for the vectors of those runs; i, known to the compiler, is the vector's place among WIDTH numbers.
    template <class F> INLINE void each_vector(int64_t g, int64_t begin, int64_t end, const F& f) const {
        each_run(g, begin, end, [&](int64_t at, int64_t length) INLINE {
            int64_t stop = at + length;
            for (; at + WIDTH <= stop; at += WIDTH)
                f(0, at, L), f(1, at + L, L), f(2, at + 2 * L, L), f(3, at + 3 * L, L);
#pragma GCC unroll 4
            for (int i = 0; i < QUAD; i++, at += L)
                if (at < stop) f(i, at, int(std::min<int64_t>(L, stop - at)));
        });
    }

    // f(begin, end) for the pieces of block b.
    template <class F> void each_piece(int64_t b, const F& f) const {
        int64_t stop = b * BLOCK + size_of_block(b);
        for (int64_t begin = b * BLOCK; begin < stop; begin += PIECE) f(begin, std::min(stop, begin + PIECE));
    }
    int size_of_group(int64_t g) const { return std::min<int64_t>(GROUP, channels - g * GROUP); }
    int64_t size_of_block(int64_t b) const { return std::min(BLOCK, count() - b * BLOCK); }

    // One number per channel of a group, as the vectors that meet its numbers.
    struct Quad {
        V v[QUAD];
        explicit Quad(const C* p) {
            for (int i = 0; i < QUAD; i++) v[i] = COLUMNS ? load(p + i * L) : set(*p);
        }
    };

    // Sums over a piece: a vector for each place, then one number per channel.
    struct Sums {
        V v[QUAD] = {};
        void to(C* out) const {
            if constexpr (COLUMNS)
                for (int i = 0; i < QUAD; i++) store(out + i * L, v[i]);
            else *out = sum((v[0] + v[1]) + (v[2] + v[3]));
        }
    };

    // first(g, b) for every block of a group, middle(g), then map(g, begin, end) over its numbers. A thread that owns whole groups finds
    // the numbers of the second phase in its cache, the last ones first; where there are too few groups to share out, threads share blocks.
    template <class A, class B, class D> void phases(const A& first, const B& middle, const D& map) const {
        int64_t G = groups(), count_ = blocks(), all = G * count_;
        auto second = [&](int64_t g, int64_t b) { map(g, b * BLOCK, b * BLOCK + size_of_block(b)); };
        if (serial() || G >= 4 * threads()) {
            parallel(G, [&](int64_t g, int64_t end) {
                for (; g < end; g++) {
                    for (int64_t b = 0; b < count_; b++) first(g, b);
                    middle(g);
                    for (int64_t b = count_; b-- > 0;) second(g, b);
                }
            }, serial());
            return;
        }
        parallel(all, [&](int64_t i, int64_t end) { for (; i < end; i++) first(i % G, i / G); });
        for (int64_t g = 0; g < G; g++) middle(g);
        parallel(all, [&](int64_t i, int64_t end) { for (; i < end; i++) second((all - 1 - i) % G, (all - 1 - i) / G); });
    }

    // middle(g) for every group, then the map alone, in the order of memory.
    template <class B, class D> void one_phase(const B& middle, const D& map) const {
        int64_t G = groups(), length = COLUMNS ? PIECE : S, all = G * ((count() + length - 1) / length);
        for (int64_t g = 0; g < G; g++) middle(g);
        parallel(all, [&](int64_t i, int64_t end) {
            for (; i < end; i++) map(i % G, i / G * length, std::min(count(), (i / G + 1) * length));
        }, serial());
    }
    bool serial() const { return count() * channels <= SERIAL_NUMBERS; }
};

// Count, mean and sum of squared deviations of G channels.
template <int G> struct Moments {
    double count = 0, mean[G] = {}, m2[G] = {};
    void join(double n, const double* other_mean, const double* other_m2) {
        double share = n / (count + n), cross = count * share;
        for (int c = 0; c < G; c++) {
            double delta = other_mean[c] - mean[c];
            mean[c] += delta * share, m2[c] += other_m2[c] + delta * delta * cross;
        }
        count += n;
    }
};

// One number per channel in memory of any float type; `p` is null where the tensor is absent.
struct PerChannel {
    void* p = nullptr;
    ScalarType dtype = ScalarType::Float;
    int64_t stride = 0;
    PerChannel() = default;
    explicit PerChannel(const std::optional<Tensor>& t) {
        if (t) p = t->mutable_data_ptr(), dtype = t->scalar_type(), stride = t->stride(0);
    }
    // f(q) with a pointer to the number of channel c.
    template <class F> void at(int64_t c, const F& f) const {
        with_type("batch_norm", dtype, [&](auto type) { f(static_cast<decltype(type)*>(p) + c * stride); });
    }
    void read(int64_t c, int n, double* to, double absent) const {
        if (!p) return void(std::fill_n(to, n, absent));
        at(c, [=, this](auto* q) {
            each_vector(q, n, [=](auto* lanes, auto* p, int i, int m) {
                store(lanes, load(p, m));
                for (int j = 0; j < m; j++) to[i + j] = lanes[j];
            });
        });
    }
    void write(int64_t c, int n, const double* from) const {
        if (!p) return;
        at(c, [=, this](auto* q) {
            each_vector(q, n, [=](auto* lanes, auto* p, int i, int m) {
                for (int j = 0; j < m; j++) lanes[j] = from[i + j];
                store(p, load(lanes), m);
            });
        });
    }

  private:
    // f(lanes, p, i, m) for numbers [i, i + m), which lie from p on; lanes is room for a vector. One by one where they lie apart.
    template <class T, class F> void each_vector(T* q, int n, const F& f) const {
        using C = compute_t<T>;
        C lanes[VL<C>] = {};
        for (int i = 0, step = stride == 1 ? VL<C> : 1; i < n; i += step) f(lanes, q + i * stride, i, std::min(step, n - i));
    }
};

// How the numbers of a tensor lie.
struct Format {
    Memory memory;
    int64_t rank, strides[5];
};

// torch's rule (suggest_memory_format): channels last where the strides of a 4-D or 5-D tensor say so without doubt, else contiguous.
inline Format format_of(const char* op, const Tensor& x) {
    int64_t rank = x.defined() ? x.dim() : 0;
    if (rank < 2 || rank > 5) fail(op, ": x must have 2 to 5 dimensions, got ", rank);
    constexpr int64_t LAST[] = {1, 4, 3, 2, 0};  // from the inner dimension outwards; a 4-D tensor has no 4
    bool last = rank >= 4 && x.stride(1) != 0;
    int64_t least = 0;
    for (int64_t d : LAST) {
        if (d >= rank || !last) continue;
        last = x.size(d) != 0 && x.stride(d) >= least && !(d == 0 && least == x.stride(1));
        least = x.stride(d) * std::max<int64_t>(x.size(d), 1);
    }
    Format format = {last || rank == 2 ? Memory::COLUMNS : Memory::ROWS, rank, {}};
    int64_t step = 1;
    auto lay = [&](int64_t d) { format.strides[d] = step, step *= std::max<int64_t>(x.size(d), 1); };
    for (int64_t d : LAST)
        if (last && d < rank) lay(d);
    for (int64_t d = rank; !last && d-- > 0;) lay(d);
    return format;
}

inline Tensor empty(const Tensor& like, const Format& format) {
    return empty_strided(like.scalar_type(), format.rank, like.sizes().data(), format.strides);
}

// t in that format: itself where it is, else a copy.
inline Tensor in_format(const Tensor& t, const Format& format) {
    bool same = true;
    for (int64_t d = 0; d < format.rank; d++) same = same && (t.size(d) == 1 || t.stride(d) == format.strides[d]);
    if (same) return t;
    using torch::headeronly::MemoryFormat;
    bool last = format.rank > 2 && format.memory == Memory::COLUMNS;
    auto channels_last = format.rank == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    return torch::stable::contiguous(t, last ? channels_last : MemoryFormat::Contiguous);
}
