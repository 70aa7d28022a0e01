// How kernels that move memory share out their work, and sums that come out the same whatever the number of threads.
//
//   each_row       body(m) for every row, in parallel where there is enough to do
//   each_stretch   body(begin, end) over stretches of a long array
//   ordered_sum    the sum of a long array: stretches of fixed length, added in order
#pragma once
#include <algorithm>
#include <vector>

#include "op.h"

constexpr int64_t STRETCH = 1 << 13;         // numbers in a stretch: a multiple of every vector, small enough to stay in the L1 cache
constexpr int64_t SERIAL_NUMBERS = 1 << 14;  // up to here waking a second thread costs more than it saves

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
