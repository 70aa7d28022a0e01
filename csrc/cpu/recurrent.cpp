// One recurrent layer over whole sequences, forward: a = W_ih x + biases for some time steps at a time, one product, so that a is still in
// the cache when the steps of recurrent.h read it.
#include "recurrent_op.h"

namespace {
using namespace recurrent;

constexpr const char* FORWARD = "recurrent_forward";
constexpr int64_t TOKENS_AT_ONCE = 512;

template <class T, class Cell> void forward(const Layer& l, const Arrays<T>& to) {
    using C = compute_t<T>;
    constexpr int G = Cell::GATES;
    const int64_t D = l.D, H = l.H, P = l.P, I = l.I, N = l.N, T_ = l.tokens.T;
    Carried<T, Cell> carried(D, l.B, P, H, l.projected ? H : 0);
    Forward<T, Cell> run{l.tokens, to, carried, {}};
    std::vector<C> bias[2];
    for (int64_t d = 0; d < D; d++) bias[d] = biases<T, Cell>(l, d, run.b_hn[d]);

    Tensor inputs[2], panels[2];
    int64_t steps = std::clamp<int64_t>(TOKENS_AT_ONCE / l.B, 1, T_);
    for (int64_t d = 0; d < D; d++) inputs[d] = empty(statistics_type(l.x), {std::min(steps * l.B, N), G * H});
    auto input = [&](int64_t d, int64_t p0, int64_t p1) {  // a of the tokens of some steps
        int64_t t0 = d ? T_ - p1 : p0, t1 = d ? T_ - p0 : p1, first = l.tokens.offset[t0];
        int64_t count = (t1 < T_ ? l.tokens.offset[t1] : N) - first;
        C* a = ::data<C>(inputs[d]);
        multiply_rows(count, G * H, I, Matrix<T>{::data<T>(l.x) + first * I, I, 1}, matrix<T>(l.weight(d, 0)), a, [&](const auto& t) {
            for (int i = 0; i < t.rows; i++)
                for (int j = 0; j < t.columns; j += VL<C>)
                    store(a + (t.m + i) * G * H + t.n + j, load(t.p + i * t.ld + j) + load(bias[d].data() + t.n + j, t.columns - j), t.columns - j);
        });
        run.input[d] = a, run.first[d] = first;
    };
    if (T_ == 1 && !l.projected) {  // nothing to pack for
        for (int64_t d = 0; d < D; d++) {
            input(d, 0, 1);
            Tensor sums = empty(statistics_type(l.x), {l.B, G * H});
            C* s = ::data<C>(sums);
            multiply_rows(l.B, G * H, H, Matrix<T>{to.h0 + d * l.B * H, H, 1}, matrix<T>(l.weight(d, 1)), s,
                          [&](const auto& t) { store_tile(t, s, G * H); });
            Share all{d, 0, 1, l.B, 0};
            auto rows = [&](int64_t begin, int64_t end) {
                run.begin(all, 0, begin, end);
                run.units(all, 0, 0, begin, end, 0, H, {s, G * H, H});
            };
            parallel(l.B, rows, l.B * H * G <= SERIAL_NUMBERS);
        }
        return;
    }
    run.w = packed<T>(l, false);
    auto all = shares(D, l.B, l.alone() ? 1 : threads());
    for (int64_t p = 0; p < T_; p += steps) {
        int64_t until = std::min(T_, p + steps);
        for (int64_t d = 0; d < D; d++) input(d, p, until);
        auto some = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) run.steps(all[i], p, until);
        };
        parallel(int64_t(all.size()), some, l.alone());
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(Tensor x, Tensor h0, OptionalTensor c0, Tensors weights,
                                                                     OptionalTensor batch_sizes, int64_t mode, bool keep_gates,
                                                                     bool keep_cells) {
    Layer l(FORWARD, x, h0, c0, weights, batch_sizes, mode);
    ScalarType numbers = statistics_type(x);
    Tensor y = empty(x, {l.N, l.D * l.P}), hn = empty(x, {l.D, l.B, l.P}), cn = l.cell ? empty(x, {l.D, l.B, l.H}) : Tensor();
    bool gated = mode == LSTM || mode == GRU;
    Tensor gates = keep_gates && gated ? empty(numbers, {l.N, l.D, 4, l.H}) : Tensor();
    Tensor cells = keep_cells && l.cell ? empty(numbers, {l.N, l.D, l.H}) : Tensor();
    if (l.N == 0) fail(FORWARD, ": x has no rows, needs at least one token");
    if (l.empty()) return {y, hn, cn, gates, cells};
    with_type(FORWARD, l.dtype, [&](auto type) {
        using T = decltype(type);
        using C = compute_t<T>;
        Arrays<T> to = l.arrays<T>();
        to.y = ::data<T>(y), to.hn = ::data<T>(hn), to.cn = ::data<T>(cn), to.gates = ::data<C>(gates), to.cells = ::data<C>(cells);
        with_cell<C>(mode, [&](auto cell) { forward<T, decltype(cell)>(l, to); });
    });
    return {y, hn, cn, gates, cells};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, m) { m.impl("recurrent_forward", TORCH_BOX(&recurrent_forward)); }
