// One recurrent layer over whole sequences, forward. Where enough sequences run at once to make use of every weight that is read, W_ih x is
// part of the steps. Else it is one product for some of them at a time, so that what it makes is still in the cache when they read it.
#include "recurrent_forward.h"
#include "recurrent_op.h"

namespace {
using namespace recurrent;

constexpr const char* FORWARD = "recurrent_forward";
constexpr int64_t TOKENS_AT_ONCE = 512, MANY_SEQUENCES = 16;
enum { INPUTS = 11, SUMS };  // scratch slots: a tensor costs a tiny step a tenth of its time

// The only step of sequences of one token, in direction d: nothing to pack for.
template <class T, class Cell> void one_step(const Layer& l, const Forward<T, Cell>& run, int64_t d) {
    using E = typename step_micro<T>::Element;
    constexpr int G = Cell::GATES;
    const int64_t B = l.B, H = l.H, P = l.P;
    Share all{d, 0, 1, B, 0};
    auto s = scratch<compute_t<T>, SUMS>(B * std::max(G * H, P));
    Matrix<T> h0{run.to.h0 + d * B * P, P, 1};
    multiply_rows(B, G * H, P, h0, matrix<T>(l.weight(d, 1)), s, [&](const auto& t) { store_tile(t, s, G * H); });
    auto rows = [&](int64_t begin, int64_t end) {
        run.begin(all, 0, begin, end);
        run.units(all, 0, 0, begin, end, 0, H, {s, G * H, H});
    };
    parallel(B, rows, B * H * G <= SERIAL_NUMBERS);
    if (!l.projected) return;
    Matrix<E> made{run.carried.inner_row(all), run.carried.W, 1};
    Matrix<T> w_hr = matrix<T>(l.weight(d, l.each - 1));
    auto keep = [&](const auto& t) { store_tile(t, s, P); };
    if constexpr (std::is_same_v<E, T>) multiply_rows(B, P, H, made, w_hr, s, keep);
    else multiply<T>(B, P, H, reader<element_of<T>>(made), reader<element_of<T>>(w_hr), s, keep);
    run.outputs(all, 0, 0, B, 0, P, {s, P, P});
}

template <class T, class Cell> void forward(const Layer& l, const Arrays<T>& to) {
    using C = compute_t<T>;
    constexpr int G = Cell::GATES;
    const int64_t D = l.D, H = l.H, I = l.I, N = l.N, T_ = l.tokens.T;
    Carried<T, Cell> carried(D, l.B, l.P, H, l.projected ? H : 0);
    Forward<T, Cell> run{l.tokens, to, carried, {}};
    std::vector<C> bias[2];
    for (int64_t d = 0; d < D; d++) bias[d] = biases<T, Cell>(l, d, run.b_hn[d]), run.bias[d] = bias[d].data();
    if (T_ > 1 && l.B >= MANY_SEQUENCES && I > 0) {
        run.w = packed<T>(l, false, true), run.x = ::data<T>(l.x), run.I = I;
        return l.each_share([&](const Share& s, Team& team, int64_t member) { run.steps(s, 0, T_, team, member); });
    }

    int64_t steps = std::clamp<int64_t>(TOKENS_AT_ONCE / l.B, 1, T_), room = std::min(steps * l.B, N) * G * H;
    Tensor many = T_ > 1 ? empty(statistics_type(l.x), {D, room}) : Tensor();  // not kept: the backward needs room as well
    C* inputs = T_ > 1 ? ::data<C>(many) : scratch<C, INPUTS>(D * room);
    auto input = [&](int64_t d, int64_t p0, int64_t p1) {  // a of the tokens of some steps
        int64_t t0 = d ? T_ - p1 : p0, t1 = d ? T_ - p0 : p1, first = l.tokens.offset[t0];
        int64_t count = (t1 < T_ ? l.tokens.offset[t1] : N) - first;
        C* a = inputs + d * room;
        multiply_rows(count, G * H, I, Matrix<T>{::data<T>(l.x) + first * I, I, 1}, matrix<T>(l.weight(d, 0)), a, [&](const auto& t) {
            for (int i = 0; i < t.rows; i++)
                for (int j = 0; j < t.columns; j += VL<C>)
                    store(a + (t.m + i) * G * H + t.n + j, load(t.p + i * t.ld + j) + load(bias[d].data() + t.n + j, t.columns - j), t.columns - j);
        });
        run.input[d] = a, run.first[d] = first;
    };
    if (T_ == 1) {
        for (int64_t d = 0; d < D; d++) input(d, 0, 1), one_step<T, Cell>(l, run, d);
        return;
    }
    run.w = packed<T>(l, false);
    for (int64_t p = 0; p < T_; p += steps) {
        int64_t until = std::min(T_, p + steps);
        for (int64_t d = 0; d < D; d++) input(d, p, until);
        l.each_share([&](const Share& s, Team& team, int64_t member) { run.steps(s, p, until, team, member); });
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
