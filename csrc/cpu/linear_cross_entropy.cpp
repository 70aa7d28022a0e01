// linear_cross_entropy: the loss of logits x W^T + b and its gradients, without ever holding the logits.
//
// Rows go through in chunks whose logits fit a workspace. Per chunk, while its logits are in the cache:
//
//   logits  = x W^T + b                 product, in float also for half types
//   loss    of every row, then dlogits in the place of the logits (cross_entropy.h), rounded to the inputs' type
//   dx      = dlogits W                 product, finished with the chunk
//   dweight += dlogits^T x              product, its epilogue adds to what earlier chunks left
//   dbias   += column sums of dlogits
//
// Gradients come with the forward, for a row gradient that the reduction fixes or that is given, because computing the logits again would
// be a third more products. They are float (double) sums; the backward scales them by dy and rounds them.
#include "cross_entropy.h"
#include "product.h"

namespace {

constexpr const char* FORWARD = "linear_cross_entropy_forward";
constexpr const char* BACKWARD = "linear_cross_entropy_backward";
// Bytes of logits, and rows of a chunk: dweight is read and written once a chunk, so four times the bytes and twice the rows save 10 %.
constexpr int64_t WORKSPACE = 8 << 20, FEWEST_ROWS = 256, MOST_ROWS = 4096;

int64_t chunk_rows(int64_t M, int64_t N, int64_t bytes) {
    int64_t rows = std::clamp(WORKSPACE / (N * bytes), FEWEST_ROWS, MOST_ROWS), chunks = std::max<int64_t>(1, (M + rows - 1) / rows);
    return (M + chunks - 1) / chunks;  // chunks of equal height
}

template <class T> struct Problem {
    using C = compute_t<T>;
    using E = element_of<T>;
    int64_t N, K;  // classes, features
    Matrix<T> x, weight;
    const T* bias;
    C *logits, *dx, *dweight, *dbias;  // the gradients, sums so far, are null where not needed

    T* gradient(int64_t r) const { return reinterpret_cast<T*>(logits + r * N); }  // a row of dlogits begins where that of the logits does
    static constexpr int64_t WIDER = sizeof(C) / sizeof(T);

    void multiply_logits(int64_t m, int64_t rows) const {
        Matrix<T> part = {x.p + m * x.rs, x.rs, x.cs};
        auto A = [=](int64_t r0, int count, int64_t k0, int kc) { return read<E>(part, r0, count, k0, kc); };
        auto B = [=, this](int64_t r0, int count, int64_t k0, int kc) { return read<E>(weight, r0, count, k0, kc); };
        multiply<T>(rows, N, K, A, B, logits, [=, this](const auto& t) {
            for (int i = 0; i < t.rows; i++)
                for (int j = 0; j < t.columns; j += VL<C>) {
                    vec<C> v = load(t.p + i * t.ld + j);
                    if (bias) v += load(bias + t.n + j, t.columns - j);
                    store(logits + (t.m + i) * N + t.n + j, v, t.columns - j);
                }
        });
    }

    void multiply_gradients(int64_t m, int64_t rows) const {
        Matrix<T> dlogits = {gradient(0), N * WIDER, 1}, part = {x.p + m * x.rs, x.rs, x.cs};
        if (dx) {
            auto A = [=](int64_t r0, int count, int64_t k0, int kc) { return read<E>(dlogits, r0, count, k0, kc); };
            auto B = [=, this](int64_t r0, int count, int64_t k0, int kc) { return read<E>(weight.transposed(), r0, count, k0, kc); };
            multiply<T>(rows, K, N, A, B, dx + m * K, [=, this](const auto& t) { store_tile(t, dx + m * K, K); });
        }
        if (!dweight) return;
        auto A = [=](int64_t r0, int count, int64_t k0, int kc) { return read<E>(dlogits.transposed(), r0, count, k0, kc); };
        auto B = [=](int64_t r0, int count, int64_t k0, int kc) { return read<E>(part.transposed(), r0, count, k0, kc); };
        auto add = [=, this](const auto& t) {
            for (int i = 0; i < t.rows; i++)
                for (int j = 0; j < t.columns; j += VL<C>) {
                    C* at = dweight + (t.m + i) * K + t.n + j;
                    vec<C> v = load(t.p + i * t.ld + j);
                    store(at, m == 0 ? v : load(at, t.columns - j) + v, t.columns - j);
                }
        };
        // never by parts: a product that parts refuse half way starts again, and would add twice
        using Micro = typename micro_for<T, false>::type;
        Gemm<Micro>{N, K, rows, A, B, add}.run(threads(), [](int64_t n, const auto& body) { parallel(n, body); });
    }

    void add_bias_gradient(int64_t m, int64_t rows) const {
        constexpr int64_t STRIP = 16 * VL<C>;
        parallel((N + STRIP - 1) / STRIP, [=, this](int64_t begin, int64_t end) {
            for (int64_t n = begin * STRIP; n < std::min(N, end * STRIP); n += VL<C>) {
                int lanes = std::min<int64_t>(VL<C>, N - n);
                vec<C> total = m == 0 ? vec<C>{} : load(dbias + n, lanes);
                for (int64_t r = 0; r < rows; r++) total += load(gradient(r) + n, lanes);
                store(dbias + n, total, lanes);
            }
        });
    }

    void clear() const {
        for (auto [p, count] : {std::pair{dweight, N * K}, {dbias, N}})
            if (p) std::fill(p, p + count, C(0));
    }

    // g(row): the gradient of the row's loss
    template <class G> void run(int64_t M, int64_t height, const Target<T>& target, C* losses, const G& g) const {
        std::vector<C> tops(M), sums(M);
        for (int64_t m = 0; m < M; m += height) {
            int64_t rows = std::min(height, M - m);
            multiply_logits(m, rows);
            each_row(rows, N, [&, this](int64_t r) {
                Rows<C, 1> tile{N};
                tile_losses(tile, target, logits + r * N, 0, m + r, tops.data(), sums.data(), losses);
                vec<C> slope[1] = {set(g(m + r))};
                if (dx || dweight || dbias)
                    tile_gradients(tile, target, logits + r * N, gradient(r), static_cast<T*>(nullptr), 0, m + r, tops.data(), sums.data(),
                                   slope);
            });
            multiply_gradients(m, rows);
            if (dbias) add_bias_gradient(m, rows);
        }
    }
};

// ---- the ops, with every argument checked ------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target_, std::optional<Tensor> class_weight, std::optional<Tensor> dy,
    int64_t reduction, int64_t ignored, double smoothing, bool need_dx, bool need_dweight, bool need_dbias) {
    ranked(FORWARD, "x", x, 2), ranked(FORWARD, "weight", weight, 2);
    int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
    ScalarType dtype = x.scalar_type(), wide = statistics_type(x);
    checked(FORWARD, "x", x, dtype, {M, K});
    checked(FORWARD, "weight", weight, dtype, {N, K});
    if (bias) checked(FORWARD, "bias", *bias, dtype, {N});
    if (class_weight) checked(FORWARD, "class_weight", *class_weight, dtype, {N});
    checked(FORWARD, "target", target_, ScalarType::Long, {M});
    if (dy) checked(FORWARD, "dy", *dy, wide, {M});
    if (N == 0 || N > INT32_MAX) fail(FORWARD, ": weight has ", N, " classes, needs 1 to ", INT32_MAX);
    if (reduction < 0 || reduction >= REDUCTIONS) fail(FORWARD, ": reduction has code ", reduction, ", needs 0 to ", REDUCTIONS - 1);
    if ((need_dx || need_dweight || need_dbias) && reduction == NO_REDUCTION && !dy)
        fail(FORWARD, ": dy is None, needs one for every loss");
    Tensor labels = dense(target_), xs = row_or_column_major(x), ws = row_or_column_major(weight), bs = bias ? dense(*bias) : x;
    Tensor cs = class_weight ? dense(*class_weight) : x, dys = dy ? dense(*dy) : x;
    check_labels(FORWARD, labels, N, ignored);
    int64_t height = chunk_rows(M, N, wide == ScalarType::Double ? 8 : 4);
    Tensor logits = empty(wide, {height, N}), loss = empty(wide, &M, reduction ? 0 : 1), dx = need_dx ? empty(wide, {M, K}) : Tensor();
    Tensor dweight = need_dweight ? empty(wide, {N, K}) : Tensor(), dbias = need_dbias ? empty(wide, {N}) : Tensor();
    with_type(FORWARD, dtype, [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        auto numbers = [](const Tensor& t, bool there) { return there ? static_cast<C*>(t.data_ptr()) : nullptr; };
        const Target<T> target(static_cast<const int64_t*>(labels.data_ptr()), nullptr,
                               class_weight ? static_cast<const T*>(cs.data_ptr()) : nullptr, smoothing, ignored, N);
        const Problem<T> problem{N, K, matrix<T>(xs), matrix<T>(ws), bias ? static_cast<const T*>(bs.data_ptr()) : nullptr,
                                 numbers(logits, true), numbers(dx, need_dx), numbers(dweight, need_dweight), numbers(dbias, need_dbias)};
        std::vector<C> losses(M);
        const C divisor = divisor_of(target, reduction, M), *slopes = numbers(dys, dy.has_value());
        if (M == 0) problem.clear();
        else problem.run(M, height, target, losses.data(), [=](int64_t m) { return reduction ? 1 / divisor : slopes ? slopes[m] : C(0); });
        reduce(reduction, M, losses.data(), divisor, static_cast<C*>(loss.data_ptr()));
    });
    return {loss, dx, dweight, dbias};
}

// dy times the gradients that the forward found, in the type of x; dy is None where it is in them already.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(std::optional<Tensor> dy, Tensor x, std::optional<Tensor> dx,
                                                                 std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
    ScalarType wide = statistics_type(checked_like(BACKWARD, "x", x, x));
    if (dy) checked(BACKWARD, "dy", *dy, wide, {});
    auto scaled = [&](const char* name, const std::optional<Tensor>& sums) {
        if (!sums) return Tensor();
        checked(BACKWARD, name, *sums, wide, sums->sizes().data(), sums->sizes().size());
        Tensor from = dense(*sums), to = empty(x.scalar_type(), sums->sizes().data(), sums->sizes().size());
        with_type(BACKWARD, x.scalar_type(), [&](auto type) {
            using T = decltype(type);
            using C = compute_t<T>;
            auto source = static_cast<const C*>(from.data_ptr());
            auto target = static_cast<T*>(to.data_ptr());
            const vec<C> factor = set(dy ? *static_cast<const C*>(dy->data_ptr()) : C(1));
            each_stretch(to.numel(), [=](int64_t begin, int64_t end) {
                each_vector<C>(end - begin, [&](int64_t n, auto lanes) {
                    store(target + begin + n, load(source + begin + n, lanes) * factor, lanes);
                });
            });
        });
        return to;
    };
    return {scaled("dx", dx), scaled("dweight", dweight), scaled("dbias", dbias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) {
    m.impl("linear_cross_entropy_forward", TORCH_BOX(&linear_cross_entropy_forward));
    m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward));
}
