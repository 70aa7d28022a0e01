// The arguments of one recurrent layer, which both ways share, checked.
#pragma once
#include <deque>
#include <string>

#include "recurrent.h"

namespace recurrent {

enum { LSTM, GRU, RNN_TANH, RNN_RELU };
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// f(Cell<C>{}) for the cell that `mode` names.
template <class C, class F> void with_cell(int64_t mode, const F& f) {
    if (mode == LSTM) f(Lstm<C>{});
    else if (mode == GRU) f(Gru<C>{});
    else if (mode == RNN_TANH) f(Rnn<C, false>{});
    else f(Rnn<C, true>{});
}

// The arguments that both ways share, checked.
struct Layer {
    ScalarType dtype;
    int64_t N, I, D, B, H, P, G, each;  // P: the width of h; `each`: weights of a direction, w_ih, w_hh, perhaps both biases and w_hr
    bool cell, projected;
    Tokens tokens;
    Tensor x, h0, c0;
    Tensors weights;

    Layer(const char* op, const Tensor& x_, const Tensor& h0_, const OptionalTensor& c0_, const Tensors& weights_,
          const OptionalTensor& sizes, int64_t mode) {
        if (mode < LSTM || mode > RNN_RELU) fail(op, ": mode is ", mode, ", needs 0 (lstm) to 3 (rnn with relu)");
        ranked(op, "x", x_, 2), ranked(op, "h0", h0_, 3);
        dtype = x_.scalar_type();
        N = x_.size(0), I = x_.size(1), D = h0_.size(0), B = h0_.size(1), H = P = h0_.size(2), cell = mode == LSTM;
        G = mode == LSTM ? 4 : mode == GRU ? 3 : 1;
        if (D != 1 && D != 2) fail(op, ": h0 has shape ", shape_text(h0_), ", needs 1 or 2 directions in front");
        checked(op, "x", x_, dtype, {N, I});
        checked(op, "h0", h0_, dtype, {D, B, P});
        if (cell && !c0_) fail(op, ": c0 is None, needs the state of the cells of an lstm");
        int64_t count = int64_t(weights_.size());
        each = count / D, projected = each % 2;
        if (count % D || each < 2 || each > (cell ? 5 : 4) || (projected && !cell))
            fail(op, ": weights has ", count, " tensors, needs 2 or 4", cell ? ", or 3 or 5 with a projection," : "", " for each of ", D,
                 " directions");
        if (projected) H = ranked(op, "c0", *c0_, 3).size(2);
        if (cell) checked(op, "c0", *c0_, dtype, {D, B, H});
        for (int64_t i = 0; i < count; i++) {
            std::string name = "weights[" + std::to_string(i) + "]";
            if (projected && i % each == each - 1) checked(op, name.c_str(), weights_[i], dtype, {P, H});
            else if (i % each < 2) checked(op, name.c_str(), weights_[i], dtype, {G * H, i % each ? P : I});
            else checked(op, name.c_str(), weights_[i], dtype, {G * H});
        }
        find_tokens(op, sizes);
        x = dense(x_), h0 = dense(h0_);
        if (cell) c0 = dense(*c0_);
        for (const Tensor& w : weights_) weights.push_back(dense(w));
    }
    void find_tokens(const char* op, const OptionalTensor& sizes) {
        tokens.B = B, tokens.N = N;
        if (!sizes) {
            if (B ? N % B : N) fail(op, ": x has ", N, " rows, needs a multiple of the ", B, " sequences in h0");
            tokens.T = B ? N / B : 0;
            for (int64_t t = 0; t < tokens.T; t++) tokens.size.push_back(B), tokens.offset.push_back(t * B);
            return;
        }
        ranked(op, "batch_sizes", *sizes, 1);
        tokens.T = sizes->size(0);
        checked(op, "batch_sizes", *sizes, ScalarType::Long, {tokens.T});
        Tensor kept = dense(*sizes);
        auto size = static_cast<const int64_t*>(kept.data_ptr());
        int64_t total = 0;
        for (int64_t t = 0; t < tokens.T; t++) {
            int64_t most = t ? size[t - 1] : B;
            if (size[t] < 1 || size[t] > most || (t == 0 && size[t] != B))
                fail(op, ": batch_sizes[", t, "] is ", size[t], ", needs ", t ? "1 to " : "the number of sequences in h0, ", most);
            tokens.size.push_back(size[t]), tokens.offset.push_back(total);
            total += size[t];
        }
        if (total != N) fail(op, ": batch_sizes sum up to ", total, " tokens, and x has ", N, " rows");
    }
    bool empty() const { return N == 0 || B == 0 || H == 0 || P == 0; }
    bool biased() const { return each >= 4; }
    bool alone() const { return double(N) * D * G * H * P < SERIAL; }  // too little to share out
    // Go through all shares: steps(share, team, member).
    template <class Steps> void each_share(const Steps& steps) const {
        auto all = shares(D, B, alone() ? 1 : threads());
        int64_t count = int64_t(all.size()), work = ceil_div(D * B, count) * G * H * H;
        int64_t members = alone() || projected ? 1 : team_size(count, threads(), work);
        std::deque<Team> teams;
        for (int64_t i = 0; i < count; i++) teams.emplace_back(members);
        auto some = [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) steps(all[i / members], teams[i / members], i % members);
        };
        parallel(count * members, some, alone());
    }
    const Tensor& weight(int64_t d, int64_t i) const { return weights[d * each + i]; }
    template <class T> Arrays<T> arrays() const {
        Arrays<T> a{};
        a.D = D, a.H = H, a.P = P, a.h0 = ::data<T>(h0), a.c0 = ::data<T>(c0);
        return a;
    }
};
// The weights of the steps, packed in scratch of this thread; with W_ih, if it is part of every step.
template <class T> StepWeights<step_micro<T>> packed(const Layer& l, bool back, bool input = false) {
    using E = typename step_micro<T>::Element;
    StepWeights<step_micro<T>> w;
    for (int64_t d = 0; d < l.D; d++) {
        w.hh[d] = back ? Panels<step_micro<T>>{l.P, l.G * l.H, 1} : Panels<step_micro<T>>{l.H, l.P, l.G};
        if (input) w.ih[d] = {l.H, l.I, l.G};
        if (l.projected) w.hr[d] = back ? Panels<step_micro<T>>{l.H, l.P, 1} : Panels<step_micro<T>>{l.P, l.H, 1};
    }
    E* room = scratch<E, 10>(l.D * (w.hh[0].room() + w.hr[0].room() + w.ih[0].room()));
    auto pack = [&](Panels<step_micro<T>>& panels, Matrix<T> weight) {
        panels.p = room, room += panels.room();
        if (back) weight = weight.transposed();
        panels.pack([&](int g, int64_t u, int count, int64_t k, int kc) { return read<E>(weight, g * panels.units + u, count, k, kc); });
    };
    for (int64_t d = 0; d < l.D; d++) {
        pack(w.hh[d], matrix<T>(l.weight(d, 1)));
        if (input) pack(w.ih[d], matrix<T>(l.weight(d, 0)));
        if (l.projected) pack(w.hr[d], matrix<T>(l.weight(d, l.each - 1)));
    }
    return w;
}
template <class T> T* data(const OptionalTensor& t) { return t ? ::data<T>(*t) : nullptr; }

// The biases of a direction as one; the last gate of a GRU keeps its b_hh apart.
template <class T, class Cell> std::vector<compute_t<T>> biases(const Layer& l, int64_t d, const compute_t<T>*& b_hn) {
    using C = compute_t<T>;
    int64_t rows = Cell::GATES * l.H, apart = Cell::SPLIT ? l.H : 0;
    std::vector<C> sum(rows + round_up(apart, VL<C>));
    if (!l.biased()) return sum;
    auto b_ih = ::data<T>(l.weight(d, 2)), b_hh = ::data<T>(l.weight(d, 3));
    for (int64_t i = 0; i < rows; i++) {
        C ih = load(b_ih + i, 1)[0], hh = load(b_hh + i, 1)[0];
        sum[i] = i < rows - apart ? ih + hh : ih;
        if (i >= rows - apart) sum[i + apart] = hh;
    }
    b_hn = sum.data() + rows;
    return sum;
}

}  // namespace recurrent
