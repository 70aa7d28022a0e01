// One recurrent layer over whole sequences, backward: the steps of recurrent.h leave da behind, the gradient of what goes into the gates.
// The rest are products over all tokens at once: dx = da W_ih, dW_ih = da^T x, dW_hh = da^T h', dW_hr = dh^T o tanh(c); db sums da.
#include "recurrent_backward.h"
#include "recurrent_op.h"

namespace {
using namespace recurrent;

constexpr const char* BACKWARD = "recurrent_backward";
constexpr int64_t FEW_TOKENS = 4;         // up to here products over all tokens are bound by writing their results
constexpr int64_t TOKENS_PACKED = 1024;  // at a time: more would take no less time, and as much memory again as da

// out[n] = sum over the rows of x, in order.
template <class T> void column_sums(Matrix<T> x, int64_t M, int64_t N, T* out) {
    using C = compute_t<T>;
    constexpr int64_t WIDEST = 64 * VL<C>;  // their sums stay in the L1 cache
    int64_t strip = std::min(WIDEST, round_up(ceil_div(N, threads()), VL<C>));
    auto strips = [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * strip; n < std::min(N, end * strip); n += strip) {
            int columns = std::min(strip, N - n);
            alignas(64) C sum[WIDEST] = {};
            for (int64_t m = 0; m < M; m++)
                for (int j = 0; j < columns; j += VL<C>) store(sum + j, load(sum + j) + load(x.p + m * x.rs + n + j, columns - j));
            for (int j = 0; j < columns; j += VL<C>) store(out + n + j, load(sum + j), columns - j);
        }
    };
    parallel(ceil_div(N, strip), strips, M * N < 1 << 16);
}

// out = a^T b, of matrices with a row for every token.
template <class T> void outer_products(int64_t rows, int64_t columns, int64_t N, Matrix<T> a, Matrix<T> b, T* out) {
    using E = element_of<T>;
    using C = compute_t<T>;
    if (N > FEW_TOKENS)
        return multiply<T>(rows, columns, N, reader<E>(a.transposed()), reader<E>(b.transposed()), out,
                           [=](const auto& t) { store_tile(t, out, columns); }, threads(), TOKENS_PACKED);
    each_row(rows, columns, [&](int64_t i) {
        for (int64_t j = 0; j < columns; j += VL<C>) {
            int lanes = std::min<int64_t>(VL<C>, columns - j);
            vec<C> sum{};
            for (int64_t n = 0; n < N; n++) sum += load(a.p + n * a.rs + i, 1)[0] * load(b.p + n * b.rs + j, lanes);
            store(out + i * columns + j, sum, lanes);
        }
    });
}

// h' of every token in direction d: [N][P].
template <class T> Tensor states_before(const Layer& l, const Arrays<T>& of, int64_t d) {
    const int64_t P = l.P;
    Tensor found = empty(l.dtype, {l.N, P});
    T* to = ::data<T>(found);
    auto some = [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++)
            for (int64_t b = 0; b < l.tokens.size[t]; b++) {
                int64_t n = l.tokens.beside(t, b, d == 1);
                const T* from = n >= 0 ? of.y + (n * l.D + d) * P : of.h0 + (d * l.B + b) * P;
                std::copy(from, from + P, to + (l.tokens.offset[t] + b) * P);
            }
    };
    parallel(l.tokens.T, some, l.N * P <= SERIAL_NUMBERS);
    return found;
}

// o tanh(c) of every token in direction d, which W_hr projects: [N][H].
template <class T, class Cell> Tensor unprojected(const Layer& l, const Arrays<T>& of, int64_t d) {
    using C = compute_t<T>;
    using V = vec<C>;
    Tensor found = empty(l.dtype, {l.N, l.H});
    T* to = ::data<T>(found);
    each_row(l.N, l.H, [&](int64_t n) {
        int64_t place = (n * l.D + d) * l.H;
        for (int64_t u = 0; u < l.H; u += VL<C>) {
            int lanes = std::min<int64_t>(VL<C>, l.H - u);
            V kept[Cell::KEPT];
            for (int g = 0; g < Cell::KEPT; g++) kept[g] = load(of.gates + place * Cell::KEPT + g * l.H + u, lanes);
            store(to + n * l.H + u, Cell::output(kept, load(of.cells + place + u, lanes)), lanes);
        }
    });
    return found;
}

// What the forward would have kept of the gates, from x and y.
template <class T, class Cell> Tensor gates_again(const Layer& l, const Arrays<T>& of) {
    using C = compute_t<T>;
    using V = vec<C>;
    constexpr int G = Cell::GATES, KEPT = Cell::KEPT;
    const int64_t H = l.H;
    Tensor found = empty(statistics_type(l.x), {l.N, l.D, KEPT, H});
    for (int64_t d = 0; d < l.D; d++) {
        const C* b_hn = nullptr;
        auto bias = biases<T, Cell>(l, d, b_hn);
        Tensor before = states_before(l, of, d), a = empty(found, {l.N, G * H}), s = empty(found, {l.N, G * H});
        C *ap = ::data<C>(a), *sp = ::data<C>(s), *to = ::data<C>(found);
        multiply_rows(l.N, G * H, l.I, matrix<T>(l.x), matrix<T>(l.weight(d, 0)), ap, [&](const auto& t) { store_tile(t, ap, G * H); });
        multiply_rows(l.N, G * H, l.P, matrix<T>(before), matrix<T>(l.weight(d, 1)), sp, [&](const auto& t) { store_tile(t, sp, G * H); });
        each_row(l.N, G * H, [&](int64_t n) {
            for (int64_t u = 0; u < H; u += VL<C>) {
                int lanes = std::min<int64_t>(VL<C>, H - u);
                V as[G], ss[G], kept[KEPT], state{};
                for (int g = 0; g < G; g++) {
                    int64_t at = g * H + u;
                    as[g] = load(ap + n * G * H + at, lanes) + load(bias.data() + at, lanes), ss[g] = load(sp + n * G * H + at, lanes);
                }
                Cell::forward(as, ss, b_hn ? load(b_hn + u, lanes) : V{}, state, kept);
                for (int g = 0; g < KEPT; g++) store(to + ((n * l.D + d) * KEPT + g) * H + u, kept[g], lanes);
            }
        });
    }
    return found;
}

// The only step of sequences of one token, in direction d: nothing to pack for.
template <class T, class Cell> void one_step_back(const Layer& l, const Backward<T, Cell>& run, int64_t d) {
    using E = typename step_micro<T>::Element;
    const int64_t B = l.B, H = l.H, P = l.P, rows = l.G * H;
    Share all{d, 0, 1, B, 0};
    Tensor sums = empty(statistics_type(l.x), {B, std::max(H, P)});
    auto s = ::data<compute_t<T>>(sums);
    auto times = [&](Matrix<E> x, int64_t K, const Tensor& w) {  // sums = x W
        auto A = [=](auto element) { return reader<decltype(element)>(x); };
        multiply_columns(B, w.size(1), K, A, matrix<T>(w), s, [&](const auto& t) { store_tile(t, s, w.size(1)); });
    };
    auto units = [&](int64_t p, int64_t known, int64_t running) {
        auto some = [&](int64_t begin, int64_t end) { run.units(all, 0, p, begin, end, known, running, 0, H, {s, H, H}); };
        parallel(B, some, B * rows <= SERIAL_NUMBERS);
    };
    if (l.projected) {
        run.outputs(all, 0, B, 0, B, 0, P, {s, P, P});
        times({run.carried.inner_row(all), run.carried.W, 1}, P, l.weight(d, l.each - 1));
    }
    units(0, 0, B);
    times({run.carried.row(all, 0), run.carried.K, 1}, rows, l.weight(d, 1));
    if (l.projected) run.outputs(all, 0, B, B, 0, 0, P, {s, P, P});
    units(1, B, 0);
}

// da and ds of all tokens, dh0 and dc0.
template <class T, class Cell> void steps_back(const Layer& l, const Arrays<T>& of) {
    const int64_t D = l.D;
    Carried<T, Cell> carried(D, l.B, l.G * l.H, l.H, l.projected ? l.P : 0);
    Backward<T, Cell> run{l.tokens, of, carried};
    if (l.tokens.T == 1) {
        for (int64_t d = 0; d < D; d++) one_step_back<T, Cell>(l, run, d);
        return;
    }
    run.w = packed<T>(l, true);
    l.each_share([&](const Share& s, Team& team, int64_t member) { run.steps(s, team, member); });
}

// dx = sum over the directions of da W_ih: one product, with the weights of both directions below each other.
template <class T> void input_gradient(const Layer& l, Matrix<T> da, T* dx) {
    int64_t K = l.D * l.G * l.H;
    Tensor stacked = l.weight(0, 0);
    if (l.D == 2) {
        stacked = empty(l.dtype, {K, l.I});
        for (int64_t d = 0; d < 2; d++) {
            const T* w = ::data<T>(l.weight(d, 0));
            std::copy(w, w + l.G * l.H * l.I, ::data<T>(stacked) + d * l.G * l.H * l.I);
        }
    }
    for (int64_t n = 0; n < l.N; n += TOKENS_PACKED) {
        Matrix<T> some{da.p + n * da.rs, da.rs, da.cs};
        T* to = dx + n * l.I;
        auto A = [=](auto element) { return reader<decltype(element)>(some); };
        multiply_columns(std::min(TOKENS_PACKED, l.N - n), l.I, K, A, matrix<T>(stacked), to,
                         [=, I = l.I](const auto& t) { store_tile(t, to, I); });
    }
}

template <class T, class Cell> void weight_gradients(const Layer& l, const Arrays<T>& of, const Tensors& dweights) {
    constexpr int G = Cell::GATES;
    const int64_t H = l.H, D = l.D, N = l.N, whole = (Cell::SPLIT ? G - 1 : G) * H;  // gates whose s has the gradient of their a
    for (int64_t d = 0; d < D; d++) {
        Matrix<T> da{of.da + d * G * H, D * G * H, 1}, ds{of.ds + d * H, D * H, 1};
        auto out = [&](int64_t i) { return ::data<T>(dweights[d * l.each + i]); };
        outer_products(G * H, l.I, N, da, matrix<T>(l.x), out(0));
        Tensor before = states_before(l, of, d);
        outer_products(whole, l.P, N, da, matrix<T>(before), out(1));
        if (Cell::SPLIT) outer_products(H, H, N, ds, matrix<T>(before), out(1) + whole * H);
        if constexpr (Cell::HAS_CELL)
            if (l.projected)
                outer_products(l.P, H, N, {of.dh + d * l.P, D * l.P, 1}, matrix<T>(unprojected<T, Cell>(l, of, d)), out(l.each - 1));
        if (!l.biased()) continue;
        column_sums(da, N, G * H, out(2));
        std::copy(out(2), out(2) + whole, out(3));
        if (Cell::SPLIT) column_sums(ds, N, H, out(3) + whole);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensors> recurrent_backward(
    OptionalTensor dy, OptionalTensor dhn, OptionalTensor dcn, Tensor x, Tensor h0, OptionalTensor c0, Tensors weights,
    OptionalTensor batch_sizes, Tensor y, OptionalTensor gates, OptionalTensor cells, int64_t mode, bool need_dx, bool need_dweights) {
    Layer l(BACKWARD, x, h0, c0, weights, batch_sizes, mode);
    auto given = [&](const char* name, OptionalTensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
        if (t) checked(BACKWARD, name, *t, dtype, shape), t = dense(*t);
    };
    ScalarType numbers = statistics_type(x);
    bool gated = mode == LSTM || mode == GRU;
    given("dy", dy, l.dtype, {l.N, l.D * l.P}), given("dhn", dhn, l.dtype, {l.D, l.B, l.P}), given("dcn", dcn, l.dtype, {l.D, l.B, l.H});
    if (gated) given("gates", gates, numbers, {l.N, l.D, 4, l.H});
    if (l.cell && !cells) fail(BACKWARD, ": cells is None, needs what recurrent_forward kept of an lstm");
    if (l.cell) given("cells", cells, numbers, {l.N, l.D, l.H});
    checked(BACKWARD, "y", y, l.dtype, {l.N, l.D * l.P});
    y = dense(y);
    if (l.N == 0) fail(BACKWARD, ": x has no rows, needs at least one token");

    Tensor dx = need_dx ? empty(x, {l.N, l.I}) : Tensor(), dh0 = empty(h0), dc0 = l.cell ? empty(*c0) : Tensor();
    Tensors dweights;
    for (const Tensor& w : weights)
        if (need_dweights) dweights.push_back(empty(w));
    if (l.empty()) return {dx, dh0, dc0, dweights};
    Tensor da = empty(x, {l.N, l.D, l.G * l.H}), ds = mode == GRU ? empty(x, {l.N, l.D, l.H}) : Tensor();
    Tensor dh = l.projected ? empty(x, {l.N, l.D, l.P}) : Tensor();
    with_type(BACKWARD, l.dtype, [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        Arrays<T> of = l.arrays<T>();
        of.y = ::data<T>(y), of.cells = data<C>(cells), of.dy = data<T>(dy), of.dhn = data<T>(dhn);
        of.dcn = data<T>(dcn), of.dh0 = ::data<T>(dh0), of.dc0 = ::data<T>(dc0), of.da = ::data<T>(da), of.ds = ::data<T>(ds);
        of.dh = ::data<T>(dh);
        with_cell<C>(mode, [&](auto cell) {
            using Cell = decltype(cell);
            if constexpr (Cell::KEPT > 0)
                if (!gates) gates = gates_again<T, Cell>(l, of);
            of.gates = data<C>(gates);
            steps_back<T, Cell>(l, of);
            if (need_dweights) weight_gradients<T, Cell>(l, of, dweights);
        });
        if (need_dx) input_gradient<T>(l, {of.da, l.D * l.G * l.H, 1}, ::data<T>(dx));
    });
    return {dx, dh0, dc0, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("recurrent_backward", TORCH_BOX(&recurrent_backward)); }
