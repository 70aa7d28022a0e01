// How kernels that move memory share out their work and write what they make, and sums that come out the same whatever the number of threads.
//
//   each_row       body(m) for every row, in parallel where there is enough to do
//   each_stretch   body(begin, end) over stretches of a long array
//   ordered_sum    the sum of a long array: stretches of fixed length, added in order
//   Destination    where a result goes: into the caches, or past them
#pragma once
#include <algorithm>
#include <vector>

#include "op.h"

constexpr int64_t STRETCH = 1 << 13;         // numbers in a stretch: a multiple of every vector, small enough to stay in the L1 cache
constexpr int64_t SERIAL_NUMBERS = 1 << 14;  // up to here waking a second thread costs more than it saves

// Where a kernel writes: into the caches, or past them a result so large that no part of it would still be there when it is read. That
// saves fetching the memory first, a third of the traffic of a copy.
struct Destination {
    static constexpr int64_t LARGE = 32 << 20, LINE = 64;  // bytes
    bool past_caches;
    // For `bytes` bytes at p, written in rows of `row` bytes: the lines of the cache must be written whole.
    Destination(const void* p, int64_t bytes, int64_t row = LINE)
        : past_caches(bytes >= LARGE && row % LINE == 0 && reinterpret_cast<uintptr_t>(p) % LINE == 0) {}
    template <class T> INLINE void store(T* p, vec<compute_t<T>> v, int n = VL<compute_t<T>>) const {
        if (past_caches) stream(p, v);
        else ::store(p, v, n);
    }
    // The same for a part that lies anywhere: only whole vectors that are aligned go past the caches.
    template <class T> INLINE static void store_past(T* p, vec<compute_t<T>> v, int n) {
        constexpr int L = VL<compute_t<T>>;
        if (n < L || reinterpret_cast<uintptr_t>(p) % (L * sizeof(T))) ::store(p, v, n);
        else stream(p, v);
    }
    template <class T> INLINE static void stream(T* p, vec<compute_t<T>> v) {
        if constexpr (sizeof(T) == 2) stream_raw(p, narrow(v, T{}));
        else stream_raw(p, v);
    }
    ~Destination() { if (past_caches) stream_fence(); }  // before another thread is told that the result is there
};

template <class Body> void each_row(int64_t M, int64_t N, const Body& body) {
    auto rows = [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; m++) body(m);
    };
    parallel(M, rows, M * N <= SERIAL_NUMBERS);
}

// Stretch boundaries do not depend on the threads; body may run for several of them at once, as one longer stretch.
template <class Body> void each_stretch(int64_t N, const Body& body) {
    int64_t count = (N + STRETCH - 1) / STRETCH;
    parallel(count, [&](int64_t begin, int64_t end) { body(begin * STRETCH, std::min(N, end * STRETCH)); }, N <= SERIAL_NUMBERS);
}

// part(begin, end) is the sum over one stretch.
template <class Part> auto ordered_sum(int64_t N, const Part& part) {
    int64_t count = (N + STRETCH - 1) / STRETCH;
    std::vector<decltype(part(N, N))> sums(count);
    auto stretches = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) sums[i] = part(i * STRETCH, std::min(N, (i + 1) * STRETCH));
    };
    parallel(count, stretches, N <= SERIAL_NUMBERS);
    decltype(part(N, N)) total{};
    for (const auto& sum : sums) total += sum;
    return total;
}
