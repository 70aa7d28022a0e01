// embedding: y[l] = weight[index[l]], and its gradient: rows of dy added up where they belong to the same row of weight.
//
//   forward    copies rows; the threads share out the positions l.
//   backward   chains the positions of every index v: first[v] is where v stands first, next[l] where the index at l stands again. A thread
//              adds the rows of dy along the chain of each of its rows v in registers and writes dweight[v] once, zeros if v stands nowhere.
//              The chains are made from the last position to the first, so they run, and numbers are added, in the order of l.
//
// Memory decides both. Chaining is serial: a list takes a random access per position, sorting by counting takes three.
#include <atomic>
#include <limits>
#include <numeric>

#include "op.h"
#include "rows.h"

namespace {

constexpr const char* FORWARD = "embedding_forward";
constexpr const char* BACKWARD = "embedding_backward";
constexpr int64_t AHEAD = 16;            // rows from the one in hand to the one that is fetched
constexpr int64_t SMALL = 512 << 10;     // bytes of a table that stays in the L2 cache, where fetching costs more than it saves
constexpr int64_t BLOCKS = 1 << 10;      // of rows of weight, whose work is counted so that the threads get equal shares

using Position = int32_t;
constexpr Position NOWHERE = -1;

inline void fetch(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);  // into the L2 cache
}

// Numbers are copied as the bits they are: no type needs to be known, and a NaN keeps its payload.
inline void copy_row(const void* from, void* to, int64_t bytes) {
    using V = vec<uint16_t>;
    auto p = static_cast<const uint16_t*>(from);
    auto q = static_cast<uint16_t*>(to);
    int64_t n = bytes / 2, i = 0;
    for (; i + VL<uint16_t> <= n; i += VL<uint16_t>) store_raw(q + i, load_raw<V>(p + i));
    if (i < n) store_raw(q + i, load_raw<V>(p + i, n - i), n - i);
}

inline bool is_row(int64_t v, int64_t V) { return uint64_t(v) < uint64_t(V); }  // a negative index is a large number without a sign

template <class I> [[noreturn]] void refuse(const char* op, const I* index, int64_t V) {
    int64_t l = 0;
    while (is_row(index[l], V)) l++;
    fail(op, ": index ", index[l], " at position ", l, " (in row-major order) is out of range for the ", V, " rows of weight");
}

template <class I> void forward(const char* weight, const I* index, char* y, int64_t L, int64_t V, int64_t pitch, int64_t bytes) {
    bool far = V * bytes > SMALL;
    std::atomic<bool> wrong = false;
    parallel(L, [=, &wrong](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; l++) {
            if (far && l + AHEAD < end) fetch(weight + index[l + AHEAD] * pitch, bytes);
            if (is_row(index[l], V)) copy_row(weight + index[l] * pitch, y + l * bytes, bytes);
            else wrong = true;
        }
    }, L * bytes <= SERIAL_NUMBERS * 4);
    if (wrong) refuse(FORWARD, index, V);
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
    std::vector<Position> first(V, NOWHERE), next(L);
    int shift = 0;
    while (V >> shift >= BLOCKS) shift++;
    std::vector<int64_t> work(BLOCKS, 1 << shift);  // rows of dweight and of dy
    for (int64_t l = L; l-- > 0;) {
        int64_t v = index[l];
        if (!is_row(v, V)) refuse(BACKWARD, index, V);
        if (v != padding_idx) next[l] = first[v], first[v] = l, work[v >> shift]++;
    }

    auto row = [&](int64_t v) {
        T* to = dweight + v * D;
        if (first[v] == NOWHERE) return void(memset(to, 0, D * sizeof(T)));
        int64_t count = 0, d = 0;
        for (Position l = by_frequency ? first[v] : NOWHERE; l != NOWHERE; l = next[l]) count++;
        C scale = C(1) / std::max<int64_t>(count, 1);
        auto columns = [&](auto n, int lanes) { add_chain<n()>(dy + d, first[v], next.data(), D, scale, to + d, lanes), d += n() * VL<C>; };
        while (d + 8 * VL<C> <= D) columns(std::integral_constant<int, 8>{}, VL<C>);
        while (d + 2 * VL<C> <= D) columns(std::integral_constant<int, 2>{}, VL<C>);
        while (d < D) columns(std::integral_constant<int, 1>{}, std::min<int64_t>(VL<C>, D - d));
    };
    // Frequent indices tend to be neighbours, so parts are not of equal length. Taking turns instead would cost more: memory is written
    // fastest from front to back.
    int64_t parts = threads(), total = std::accumulate(work.begin(), work.end(), int64_t{});
    auto boundary = [&](int64_t part) {
        int64_t b = 0;
        for (int64_t before = 0; b < BLOCKS && before * parts < total * part; b++) before += work[b];
        return std::min(V, b << shift);
    };
    parallel(parts, [&](int64_t begin, int64_t end) {
        for (int64_t v = boundary(begin), stop = boundary(end); v < stop; v++) {
            if (v + AHEAD < V && first[v + AHEAD] != NOWHERE) fetch(dy + first[v + AHEAD] * D, D * sizeof(T));
            row(v);
        }
    }, (L + V) * D <= SERIAL_NUMBERS);
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

// f(pointer to the indices), of their type.
template <class F> void with_indices(const Tensor& indices, const F& f) {
    if (indices.scalar_type() == ScalarType::Int) f(static_cast<const int32_t*>(indices.data_ptr()));
    else f(static_cast<const int64_t*>(indices.data_ptr()));
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
    Tensor y = empty(weight.scalar_type(), shape.data(), shape.size());
    int64_t size = weight.element_size();
    with_indices(index, [&](auto at) {
        forward(static_cast<const char*>(w.data_ptr()), at, static_cast<char*>(y.data_ptr()), L, V, w.stride(0) * size, D * size);
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
        with_indices(index, [&](auto at) {
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
