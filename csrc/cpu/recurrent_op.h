// The arguments of one recurrent layer, which both ways share, checked.
#pragma once
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
    int64_t N, I, D, B, H, G, each;  // `each`: weights of a direction, 2 or 4
    bool cell;
    Tokens tokens;
    Tensor x, h0, c0;
    Tensors weights;

    Layer(const char* op, const Tensor& x_, const Tensor& h0_, const OptionalTensor& c0_, const Tensors& weights_,
          const OptionalTensor& sizes, int64_t mode) {
        if (mode < LSTM || mode > RNN_RELU) fail(op, ": mode is ", mode, ", needs 0 (lstm) to 3 (rnn with relu)");
        ranked(op, "x", x_, 2), ranked(op, "h0", h0_, 3);
        dtype = x_.scalar_type();
        N = x_.size(0), I = x_.size(1), D = h0_.size(0), B = h0_.size(1), H = h0_.size(2), cell = mode == LSTM;
        G = mode == LSTM ? 4 : mode == GRU ? 3 : 1;
        if (D != 1 && D != 2) fail(op, ": h0 has shape ", shape_text(h0_), ", needs 1 or 2 directions in front");
        checked(op, "x", x_, dtype, {N, I});
        checked(op, "h0", h0_, dtype, {D, B, H});
        if (cell && !c0_) fail(op, ": c0 is None, needs the state of the cells of an lstm");
        if (cell) checked(op, "c0", *c0_, dtype, {D, B, H});
        if (int64_t(weights_.size()) != 2 * D && int64_t(weights_.size()) != 4 * D)
            fail(op, ": weights has ", weights_.size(), " tensors, needs 2 or 4 for each of ", D, " directions");
        each = int64_t(weights_.size()) / D;
        for (int64_t i = 0; i < int64_t(weights_.size()); i++) {
            std::string name = "weights[" + std::to_string(i) + "]";
            if (i % each < 2) checked(op, name.c_str(), weights_[i], dtype, {G * H, i % each ? H : I});
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
    bool empty() const { return N == 0 || B == 0 || H == 0; }
    bool alone() const { return double(N) * D * G * H * H < SERIAL; }  // too little to share out
    const Tensor& weight(int64_t d, int64_t i) const { return weights[d * each + i]; }
    template <class T> Arrays<T> arrays() const {
        Arrays<T> a{};
        a.D = D, a.H = H, a.h0 = ::data<T>(h0), a.c0 = ::data<T>(c0);
        return a;
    }
};
template <class T> T* data(const OptionalTensor& t) { return t ? ::data<T>(*t) : nullptr; }

// The biases of a direction as one; the last gate of a GRU keeps its b_hh apart.
template <class T, class Cell> std::vector<compute_t<T>> biases(const Layer& l, int64_t d, const compute_t<T>*& b_hn) {
    using C = compute_t<T>;
    int64_t rows = Cell::GATES * l.H, apart = Cell::SPLIT ? l.H : 0;
    std::vector<C> sum(rows + round_up(apart, VL<C>));
    if (l.each == 2) return sum;
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
