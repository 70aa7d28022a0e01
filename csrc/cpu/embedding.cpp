// embedding: y[l] = weight[index[l]], and its gradient: rows of dy added up where they belong to the same row of weight.
//
//   forward    copies rows; the threads share out the positions l.
//   backward   chains the positions of every index v: first[v] is where v stands first, next[l] where the index at l stands again. A thread
//              adds the rows of dy along the chain of each of its rows v in registers and writes dweight[v] once, zeros if v stands nowhere.
//              The chains are made from the last position to the first, so they run, and numbers are added, in the order of l.
//
// Memory decides both. Chaining is serial: a list takes a random access per position, sorting by counting takes three.
#include <limits>

#include "op.h"
#include "rows.h"

namespace {

constexpr const char* FORWARD = "embedding_forward";
constexpr const char* BACKWARD = "embedding_backward";
constexpr int64_t AHEAD = 4;             // rows from the one in hand to the one that is fetched
constexpr int64_t NEIGHBOURS = 2 << 10;  // bytes of dweight that one thread writes before the next takes over

using Position = int32_t;
constexpr Position NOWHERE = -1;

inline void fetch(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// Numbers are copied as the bits they are: no type needs to be known, and a NaN keeps its payload.
void copy_row(const void* from, void* to, int64_t bytes) {
    using V = vec<uint16_t>;
    auto p = static_cast<const uint16_t*>(from);
    auto q = static_cast<uint16_t*>(to);
    int64_t n = bytes / 2, i = 0;
    for (; i + VL<uint16_t> <= n; i += VL<uint16_t>) store_raw(q + i, load_raw<V>(p + i));
    if (i < n) store_raw(q + i, load_raw<V>(p + i, n - i), n - i);
}

template <class I> void forward(const char* weight, const I* index, char* y, int64_t L, int64_t pitch, int64_t bytes) {
    parallel(L, [=](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; l++) {
            if (l + AHEAD < end) fetch(weight + index[l + AHEAD] * pitch, bytes);
            copy_row(weight + index[l] * pitch, y + l * bytes, bytes);
        }
    }, L * bytes <= SERIAL_NUMBERS * 4);
}

// N vectors of the sum of the rows of dy along a chain, times scale.
template <int N, class T, class C> void add_chain(const T* dy, Position l, const Position* next, int64_t D, C scale, T* to, int lanes) {
    vec<C> acc[N] = {};
    for (; l != NOWHERE; l = next[l])
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) acc[i] += load(dy + l * D + i * VL<C>, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(to + i * VL<C>, acc[i] * scale, lanes);
}

template <class T, class I>
void backward(const T* dy, const I* index, T* dweight, int64_t L, int64_t V, int64_t D, int64_t padding_idx, bool by_frequency) {
    using C = compute_t<T>;
    constexpr int N = 8;  // vectors of a row that are summed at a time
    std::vector<Position> first(V, NOWHERE), next(L);
    for (int64_t l = L; l-- > 0;)
        if (int64_t v = index[l]; v != padding_idx) next[l] = first[v], first[v] = l;

    auto row = [&](int64_t v) {
        int64_t count = 0, d = 0;
        for (Position l = by_frequency ? first[v] : NOWHERE; l != NOWHERE; l = next[l]) count++;
        C scale = C(1) / std::max<int64_t>(count, 1);
        for (; d + N * VL<C> <= D; d += N * VL<C>) add_chain<N>(dy + d, first[v], next.data(), D, scale, dweight + v * D + d, VL<C>);
        for (; d < D; d += VL<C>)
            add_chain<1>(dy + d, first[v], next.data(), D, scale, dweight + v * D + d, std::min<int64_t>(VL<C>, D - d));
    };
    // Frequent indices tend to be neighbours, so threads take turns along the rows.
    int64_t rows = std::max<int64_t>(1, NEIGHBOURS / (D * sizeof(T))), parts = threads();
    parallel(parts, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; part++)
            for (int64_t v0 = part * rows; v0 < V; v0 += parts * rows)
                for (int64_t v = v0; v < std::min(V, v0 + rows); v++) {
                    if (v + AHEAD < V && first[v + AHEAD] != NOWHERE) fetch(dy + first[v + AHEAD] * D, D * sizeof(T));
                    row(v);
                }
    }, (L + V) * D <= SERIAL_NUMBERS);
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

// f(pointer to the indices), of their type; every one of them is in [0, V).
template <class F> void with_indices(const char* op, const Tensor& indices, int64_t V, const F& f) {
    auto in_range = [&](auto index) {
        bool wrong = false;
        for (int64_t l = 0; l < indices.numel(); l++) wrong |= uint64_t(index[l]) >= uint64_t(V);
        for (int64_t l = 0; wrong; l++)
            if (index[l] < 0 || index[l] >= V)
                fail(op, ": index ", index[l], " at position ", l, " (in row-major order) is out of range for the ", V, " rows of weight");
        f(index);
    };
    if (indices.scalar_type() == ScalarType::Int) in_range(static_cast<const int32_t*>(indices.data_ptr()));
    else in_range(static_cast<const int64_t*>(indices.data_ptr()));
}

Tensor checked_indices(const char* op, const Tensor& indices) {
    if (!indices.defined()) fail(op, ": indices is undefined, needs a tensor");
    checked(op, "indices", indices, indices.scalar_type(), indices.sizes().data(), indices.sizes().size());
    if (indices.scalar_type() != ScalarType::Long && indices.scalar_type() != ScalarType::Int)
        fail(op, ": indices has dtype ", toString(indices.scalar_type()), ", needs Long or Int");
    if (indices.numel() > std::numeric_limits<Position>::max()) fail(op, ": indices has ", indices.numel(), " elements, needs fewer than 2^31");
    return dense(indices);
}

// The shape of y: that of indices, and D.
std::vector<int64_t> result_shape(const Tensor& indices, int64_t D) {
    std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
    shape.push_back(D);
    return shape;
}

Tensor embedding_forward(Tensor weight, Tensor indices) {
    ranked(FORWARD, "weight", weight, 2);
    int64_t V = weight.size(0), D = weight.size(1), L = indices.defined() ? indices.numel() : 0;
    checked(FORWARD, "weight", weight, weight.scalar_type(), {V, D});
    with_type(FORWARD, weight.scalar_type(), [](auto) {});
    Tensor index = checked_indices(FORWARD, indices), w = D <= 1 || weight.stride(1) == 1 ? weight : contiguous_copy(weight);
    std::vector<int64_t> shape = result_shape(indices, D);
    Tensor y = empty(weight, shape.data(), shape.size());
    int64_t size = weight.element_size();
    with_indices(FORWARD, index, V, [&](auto at) {
        forward(static_cast<const char*>(w.data_ptr()), at, static_cast<char*>(y.data_ptr()), L, w.stride(0) * size, D * size);
    });
    return y;
}

Tensor embedding_backward(Tensor dy, Tensor indices, int64_t V, int64_t padding_idx, bool scale_grad_by_freq) {
    Tensor index = checked_indices(BACKWARD, indices);
    if (!dy.defined() || dy.dim() == 0) fail(BACKWARD, ": dy must have a dimension more than indices");
    int64_t L = indices.numel(), D = dy.size(dy.dim() - 1);
    std::vector<int64_t> shape = result_shape(indices, D);
    checked(BACKWARD, "dy", dy, dy.scalar_type(), shape.data(), shape.size());
    if (V < 0) fail(BACKWARD, ": V is ", V, ", needs the number of rows of weight");
    Tensor dweight = empty(dy, {V, D}), dys = dense(dy);
    with_type(BACKWARD, dy.scalar_type(), [&](auto type) {
        using T = decltype(type);
        with_indices(BACKWARD, index, V, [&](auto at) {
            if (D > 0)
                backward(static_cast<const T*>(dys.data_ptr()), at, static_cast<T*>(dweight.data_ptr()), L, V, D, padding_idx,
                         scale_grad_by_freq);
        });
    });
    return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("embedding_forward", TORCH_BOX(&embedding_forward));
    m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
}
