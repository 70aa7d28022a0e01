// qkv_projection: q, k and v of attention by one product of x with three weights, which qkv_projection.h cuts, and its gradients.
// Results are [B, heads, T, head_dim] and lie as [B, T, heads, head_dim], as rows of the product.
#include "qkv_projection.h"

#include "heads.h"

namespace {

constexpr const char* FORWARD = "qkv_projection_forward";
constexpr const char* BACKWARD = "qkv_projection_backward";
constexpr const char* WEIGHTS[PARTS] = {"q_weight", "k_weight", "v_weight"};
constexpr const char* BIASES[PARTS] = {"q_bias", "k_bias", "v_bias"};
constexpr const char* GRADIENTS[PARTS] = {"dq", "dk", "dv"};
using Three = std::array<Tensor, PARTS>;
using Optionals = std::array<std::optional<Tensor>, PARTS>;

struct Sizes {
    int64_t B, T, K, D, P = 0, places = 1;
    std::array<int64_t, PARTS> H{};
    int64_t M() const { return B * T; }
};

Sizes checked_sizes(const char* op, const Tensor& x, const Three& weights, const std::optional<Tensor>& cos,
                    const std::optional<Tensor>& sin, int64_t D) {
    constexpr int64_t MOST = 1 << 24;
    Sizes s{ranked(op, "x", x, 3).size(0), x.size(1), x.size(2), D};
    checked(op, "x", x, x.scalar_type(), {s.B, s.T, s.K});
    if (D < 1 || D > MOST) fail(op, ": head_dim is ", D, ", needs 1 to ", MOST);
    for (int i = 0; i < PARTS; i++) {
        int64_t N = ranked(op, WEIGHTS[i], weights[i], 2).size(0);
        if (N % D) fail(op, ": ", WEIGHTS[i], " has ", N, " rows, needs a multiple of head_dim, ", D);
        checked(op, WEIGHTS[i], weights[i], x.scalar_type(), {i == 2 ? s.H[1] * D : N, s.K});
        s.H[i] = N / D;
    }
    if (cos.has_value() != sin.has_value()) fail(op, ": ", cos ? "sin" : "cos", " is None, needs both cos and sin, or neither");
    if (!cos) return s;
    s.P = ranked(op, "cos", *cos, 3).size(2);
    int64_t batches = cos->size(0) == 1 ? 1 : s.B;
    for (auto [name, t] : {std::pair{"cos", *cos}, {"sin", *sin}}) checked(op, name, t, statistics_type(x), {batches, s.T, s.P});
    if (2 * s.P > D) fail(op, ": cos has ", s.P, " angles, needs at most ", D / 2, " for heads of ", D);
    s.places = std::max<int64_t>(1, batches * s.T);
    return s;
}

// Sequences as the rows of one matrix, and matrices, their rows contiguous.
Tensor with_even_rows(const Tensor& x) {
    int64_t B = x.size(0), T = x.size(1), K = x.size(2);
    bool rows = (K <= 1 || x.stride(2) == 1) && (T <= 1 || x.stride(1) >= K);
    return rows && (B <= 1 || x.stride(0) == std::max<int64_t>(T, 1) * x.stride(1)) ? x : contiguous_copy(x);
}
Tensor row_major(const Tensor& w) {
    return (w.size(1) <= 1 || w.stride(1) == 1) && (w.size(0) <= 1 || w.stride(0) >= w.size(1)) ? w : contiguous_copy(w);
}
template <class T> Matrix<T> rows_of(const Tensor& t) { return {static_cast<T*>(t.mutable_data_ptr()), t.stride(t.dim() - 2), 1}; }

std::tuple<Tensor, Tensor, Tensor> qkv_projection_forward(
    Tensor x, Tensor q_weight, Tensor k_weight, Tensor v_weight, std::optional<Tensor> q_bias, std::optional<Tensor> k_bias,
    std::optional<Tensor> v_bias, std::optional<Tensor> cos, std::optional<Tensor> sin, int64_t head_dim, bool interleaved) {
    Three weights{q_weight, k_weight, v_weight}, biases, out;
    const Sizes s = checked_sizes(FORWARD, x, weights, cos, sin, head_dim);
    const Optionals given{q_bias, k_bias, v_bias};
    for (int i = 0; i < PARTS; i++) {
        if (given[i]) biases[i] = dense(checked(FORWARD, BIASES[i], *given[i], x.scalar_type(), {s.H[i] * s.D}));
        out[i] = empty_heads(x.scalar_type(), s.B, s.H[i], s.T, s.D, true);
        weights[i] = row_major(weights[i]);
    }
    Tensor xs = with_even_rows(x), coss = cos ? dense(*cos) : Tensor(), sins = sin ? dense(*sin) : Tensor();
    with_type(FORWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        Forward<T> f{s.M(), s.K, rows_of<T>(xs), {}, {s.P, s.D, interleaved}, {}, {}, data<const C>(coss), data<const C>(sins), s.places};
        for (int i = 0; i < PARTS; i++) {
            f.weights.part[i] = rows_of<T>(weights[i]), f.weights.begin[i + 1] = f.weights.begin[i] + s.H[i] * s.D;
            f.bias[i] = data<const T>(biases[i]), f.out[i] = data<T>(out[i]);
        }
        if (s.M() && f.weights.begin[PARTS]) f.run();
    });
    return {out[0], out[1], out[2]};
}

// `need`: gradients of x, of the three weights and of the three biases. What belongs to a part that has no gradient is None.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qkv_projection_backward(
    std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv, Tensor x, Tensor q_weight, Tensor k_weight,
    Tensor v_weight, std::optional<Tensor> cos, std::optional<Tensor> sin, int64_t head_dim, bool interleaved, std::vector<bool> need) {
    Three weights{q_weight, k_weight, v_weight}, slopes, dweight, dbias;
    const Sizes s = checked_sizes(BACKWARD, x, weights, cos, sin, head_dim);
    const Optionals given{dq, dk, dv};
    if (need.size() != 1 + 2 * PARTS) fail(BACKWARD, ": need has ", need.size(), " entries, needs ", 1 + 2 * PARTS);
    for (int i = 0; i < PARTS; i++) {
        if (!given[i]) continue;
        slopes[i] = with_rows(checked(BACKWARD, GRADIENTS[i], *given[i], x.scalar_type(), {s.B, s.H[i], s.T, s.D}));
        if (need[1 + i]) dweight[i] = empty(x, {s.H[i] * s.D, s.K});
        if (need[1 + PARTS + i]) dbias[i] = empty(x, {s.H[i] * s.D});
        if (need[0]) weights[i] = row_major(weights[i]);
    }
    Tensor dx = need[0] ? empty(x, {s.B, s.T, s.K}) : Tensor(), coss = cos ? dense(*cos) : Tensor(), sins = sin ? dense(*sin) : Tensor();
    Tensor xs = need[1] || need[2] || need[3] ? with_even_rows(x) : x;
    with_type(BACKWARD, x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        Backward<T> b{s.M(), s.K, s.T, {s.P, s.D, interleaved, true}, {}, data<const C>(coss), data<const C>(sins), s.places, nullptr};
        Stack<T> stack;
        bool each = true;  // weight that has a gradient is to get one
        for (int i = 0; i < PARTS; i++) {
            const Tensor& t = slopes[i];
            stack.part[i] = rows_of<T>(weights[i]), stack.begin[i + 1] = stack.begin[i] + (t.defined() ? s.H[i] * s.D : 0);
            each = each && (!t.defined() || need[1 + i]);
            for (int64_t h = 0; t.defined() && h < s.H[i]; h++) {
                T* sums = dbias[i].defined() ? data<T>(dbias[i]) + h * s.D : nullptr;
                b.heads.push_back({data<const T>(t) + h * t.stride(1), t.stride(0), t.stride(2), i < 2 && s.P, sums});
            }
        }
        const int64_t size = s.M() * b.N();
        const bool large = size * int64_t(sizeof(T)) >= int64_t(Pool::SMALLEST);  // as memory that is used again, either way
        Tensor dz = large ? empty(x, {s.M(), b.N()}) : Tensor();
        b.dz = large ? data<T>(dz) : scratch<T, 6>(size);
        if (b.N()) b.form_dz();
        if (s.K && s.M() && need[0]) b.input_gradient(stack, data<T>(dx));
        if (!s.K) return;
        const std::array to{data<T>(dweight[0]), data<T>(dweight[1]), data<T>(dweight[2])};
        if (each && b.N()) return b.weight_gradient(rows_of<T>(xs), 0, b.N(), stack, to);
        for (int i = 0; i < PARTS; i++)
            if (int64_t n0 = stack.begin[i], rows = stack.begin[i + 1] - n0; rows && dweight[i].defined())
                b.weight_gradient(rows_of<T>(xs), n0, rows, stack, to);
    });
    return {dx, dweight[0], dweight[1], dweight[2], dbias[0], dbias[1], dbias[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("qkv_projection_forward", TORCH_BOX(&qkv_projection_forward));
    m.impl("qkv_projection_backward", TORCH_BOX(&qkv_projection_backward));
}
