// linear: y = act(x W^T + b), its gradients, and nothing but readers and epilogues for the one product in gemm.h.
//
//   forward   C[m,n] = sum_k x[m,k] W[n,k]        epilogue: + b[n], act, store
//   dx        C[m,k] = sum_n dz[m,n] W[n,k]       A reads dz = dy * act'(saved) on the fly
//   dweight   C[n,k] = sum_m dz[m,n] x[m,k]       A reads dz transposed, on the fly
//   dbias     column sums of dz; where act' is costly, the same pass writes dz down and the products read that
#include "activation.h"
#include "product.h"

namespace {

constexpr const char* FORWARD = "linear_forward";
constexpr const char* BACKWARD = "linear_backward";
// Read dz = dy * act'(saved), formed in scratch.
template <class E, class T>
Block<E> read_dz(Activation act, Matrix<T> dy, Matrix<T> saved, int64_t r0, int rows, int64_t k0, int kc) {
    if (act.code == NONE) return read<E>(dy, r0, rows, k0, kc);
    bool along_k = dy.cs == 1;
    int outer = along_k ? rows : kc, inner = along_k ? kc : rows;
    int64_t ld = round_up(inner, VL<compute_t<T>>);
    E* out = scratch<E, READ>(outer * ld);
    const T *d = dy.p + r0 * dy.rs + k0 * dy.cs, *s = saved.p + r0 * saved.rs + k0 * saved.cs;
    for (int i = 0; i < outer; i++)
        act.gradient(d + i * (along_k ? dy.rs : dy.cs), s + i * (along_k ? saved.rs : saved.cs), out + i * ld, inner);
    return along_k ? Block<E>{out, ld, 1} : Block<E>{out, 1, ld};
}

template <class T>
void forward(Activation act, Matrix<T> x, Matrix<T> weight, const T* bias, T* y, T* z, int64_t M, int64_t N, int64_t K) {
    multiply_rows(M, N, K, x, weight, y, [=](const auto& t) {
        for (int i = 0; i < t.rows; i++) {
            int64_t at = (t.m + i) * N + t.n;
            act.apply(t.p + i * t.ld, bias ? bias + t.n : nullptr, y + at, z ? z + at : nullptr, t.columns);
        }
    });
}

template <class T>
void input_gradient(Activation act, Matrix<T> dy, Matrix<T> saved, Matrix<T> weight, T* dx, int64_t M, int64_t N, int64_t K) {
    auto dz = [=](auto element) {
        return [=](int64_t r0, int rows, int64_t k0, int kc) { return read_dz<decltype(element)>(act, dy, saved, r0, rows, k0, kc); };
    };
    multiply_columns(M, K, N, dz, weight, dx, [=](const auto& t) { store_tile(t, dx, K); });
}

template <class T>
void weight_gradient(Activation act, Matrix<T> dy, Matrix<T> saved, Matrix<T> x, T* dweight, int64_t M, int64_t N, int64_t K) {
    using E = element_of<T>;
    auto A = [=](int64_t r0, int rows, int64_t k0, int kc) {
        return read_dz<E>(act, dy.transposed(), saved.transposed(), r0, rows, k0, kc);
    };
    multiply<T>(N, K, M, A, reader<E>(x.transposed()), dweight, [=](const auto& t) { store_tile(t, dweight, K); });
}

// One pass over dy and saved for whatever is not null: dz = dy * act'(saved), and dbias, its column sums.
// Each thread owns strips of columns and adds their rows in order.
template <class T> void activation_gradient(Activation act, Matrix<T> dy, Matrix<T> saved, T* dz, T* dbias, int64_t M, int64_t N) {
    using C = compute_t<T>;
    constexpr int64_t WIDEST = 64 * VL<C>;  // a row of a strip and its sums stay in the L1 cache
    int64_t strip = std::min(WIDEST, round_up((N + threads() - 1) / threads(), VL<C>));
    auto strips = [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * strip; n < std::min(N, end * strip); n += strip) {
            int columns = std::min(strip, N - n);
            alignas(64) C sum[WIDEST] = {}, row[WIDEST];
            for (int64_t m = 0; m < M; m++) {
                act.gradient(dy.p + m * dy.rs + n, saved.p ? saved.p + m * saved.rs + n : nullptr, row, columns);
                for (int j = 0; j < columns; j += VL<C>) {
                    prefetch_l2(dy.p + (m + 2) * dy.rs + n + j);
                    if (saved.p) prefetch_l2(saved.p + (m + 2) * saved.rs + n + j);
                    store(sum + j, load(sum + j) + load(row + j));
                    if (dz) store(dz + m * N + n + j, load(row + j), columns - j);
                }
            }
            for (int j = 0; dbias && j < columns; j += VL<C>) store(dbias + n + j, load(sum + j), columns - j);
        }
    };
    parallel((N + strip - 1) / strip, strips, M * N < 1 << 16);
}

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t activation, double slope,
                                          bool save) {
    ranked(FORWARD, "x", x, 2), ranked(FORWARD, "weight", weight, 2);
    int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
    ScalarType dtype = x.scalar_type();
    checked(FORWARD, "x", x, dtype, {M, K});
    checked(FORWARD, "weight", weight, dtype, {N, K});
    if (bias) checked(FORWARD, "bias", *bias, dtype, {N});
    Activation act = checked_activation(FORWARD, activation, slope);
    Tensor y = empty(x, {M, N}), z = save ? empty(x, {M, N}) : Tensor();
    if (M == 0 || N == 0) return {y, z};
    Tensor xs = row_or_column_major(x), ws = row_or_column_major(weight), bs = bias ? dense(*bias) : weight;
    with_type(FORWARD, dtype, [&](auto type) {
        using T = decltype(type);
        forward<T>(act, matrix<T>(xs), matrix<T>(ws), bias ? static_cast<const T*>(bs.data_ptr()) : nullptr, static_cast<T*>(y.data_ptr()),
                   save ? static_cast<T*>(z.data_ptr()) : nullptr, M, N, K);
    });
    return {y, z};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> saved, int64_t activation,
                                                   double slope, bool need_dx, bool need_dweight, bool need_dbias) {
    ranked(BACKWARD, "x", x, 2), ranked(BACKWARD, "weight", weight, 2);
    int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
    ScalarType dtype = x.scalar_type();
    checked(BACKWARD, "x", x, dtype, {M, K});
    checked(BACKWARD, "weight", weight, dtype, {N, K});
    checked(BACKWARD, "dy", dy, dtype, {M, N});
    Activation act = checked_activation(BACKWARD, activation, slope);
    if (act.code != NONE && !saved) fail(BACKWARD, ": saved is None, needs what linear_forward kept for activation ", activation);
    if (act.code != NONE) checked(BACKWARD, "saved", *saved, dtype, {M, N});
    Tensor dx = need_dx ? empty(x, {M, K}) : Tensor(), dweight = need_dweight ? empty(x, {N, K}) : Tensor();
    Tensor dbias = need_dbias ? empty(x, {N}) : Tensor();
    need_dx = need_dx && M * K > 0, need_dweight = need_dweight && N * K > 0, need_dbias = need_dbias && N > 0;
    // dz is read along rows of dy and saved together, so both are row-major.
    Tensor d = dense(dy), s = act.code == NONE ? d : dense(*saved), dz;
    Tensor xs = need_dweight ? row_or_column_major(x) : x, ws = need_dx ? row_or_column_major(weight) : weight;
    with_type(BACKWARD, dtype, [&](auto type) {
        using T = decltype(type);
        Matrix<T> dm = {static_cast<T*>(d.data_ptr()), N, 1}, sm = {act.code == NONE ? nullptr : static_cast<T*>(s.data_ptr()), N, 1};
        T* bias_sums = need_dbias ? static_cast<T*>(dbias.data_ptr()) : nullptr;
        if (act.costly() && need_dx + need_dweight + need_dbias > 1) {
            dz = empty(dy, {M, N});
            activation_gradient<T>(act, dm, sm, static_cast<T*>(dz.data_ptr()), bias_sums, M, N);
            dm.p = static_cast<T*>(dz.data_ptr()), act.code = NONE;
        } else if (need_dbias) {
            activation_gradient<T>(act, dm, sm, nullptr, bias_sums, M, N);
        }
        if (need_dx) input_gradient<T>(act, dm, sm, matrix<T>(ws), static_cast<T*>(dx.data_ptr()), M, N, K);
        if (need_dweight) weight_gradient<T>(act, dm, sm, matrix<T>(xs), static_cast<T*>(dweight.data_ptr()), M, N, K);
    });
    return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("linear_forward", TORCH_BOX(&linear_forward));
    m.impl("linear_backward", TORCH_BOX(&linear_backward));
}
