// Cross-entropy of one row of logits: what its target asks for, the loss, and the gradient for the logits.
//
//     q[n]        what the target asks of class n:  w[n] ((1 - s) p[n] + s / N)           p: probabilities, or 1 at the label, 0 elsewhere
//     loss      = sum_n q[n] (log(sum) - (x[n] - top))                                    top, sum: see softmax.h; s: smoothing
//     dx[n]     = g (Q e^(x[n] - top) / sum - q[n]),   Q = sum_n q[n]                      g: the gradient of this row's loss
//
// A label contributes to one class alone, so q is `peak` there, and `spread`, which smoothing or probabilities add, at every class. Without
// spread no class but the label's is looked at. A row whose label is ignored has q = 0.
#pragma once
#include "softmax.h"

template <class T> struct Target {
    using C = compute_t<T>;
    const int64_t* labels;  // or null, then
    const T* probs;         // laid out as the logits
    const T* weight;        // of each class, or null for 1
    C smoothing;
    int64_t ignored, N;
    C weights = 0;  // their sum, where smoothing asks for it

    Target(const int64_t* labels, const T* probs, const T* weight, double smoothing, int64_t ignored, int64_t N)
        : labels(labels), probs(probs), weight(weight), smoothing(smoothing), ignored(ignored), N(N) {
        if (smoothing > 0)
            for (int64_t n = 0; n < N; n++) weights += weight_of(n);
    }
    bool spreads() const { return probs || smoothing > 0; }
    C weight_of(int64_t n) const { return weight ? number(weight + n) : C(1); }
    C peak(int64_t label) const { return (1 - smoothing) * weight_of(label); }
    C asked(int64_t label) const { return peak(label) + smoothing / N * weights; }  // Q
    bool keeps(int64_t row) const { return !labels || labels[row] != ignored; }
    bool valid(int64_t row) const { return !labels || labels[row] == ignored || (labels[row] >= 0 && labels[row] < N); }

    // spread[n] for a vector of classes, given where its probabilities lie
    template <class Lanes> vec<C> spread(const T* p, int64_t n, Lanes lanes) const {
        vec<C> q = set(smoothing / N);
        if (p) q += (1 - smoothing) * load(p + n, lanes);
        if (weight) q *= load(weight + n, lanes);
        return q;
    }
};

// The loss of a row with classes side by side; its normaliser is left in `at`. p: the row's probabilities or null.
template <class T> compute_t<T> loss_of_row(const Target<T>& target, const T* x, const T* p, int64_t row, Normaliser<compute_t<T>>& at) {
    using C = compute_t<T>;
    at = normaliser(x, target.N);
    if (!target.keeps(row)) return 0;
    C logsum = log_of(at.sum), loss = 0;
    if (target.labels) loss = target.peak(target.labels[row]) * (logsum - (number(x + target.labels[row]) - at.top));
    if (!target.spreads()) return loss;
    const vec<C> top = set(at.top), level = set(logsum);
    vec<C> terms{};
    each_vector<C>(target.N, [&](int64_t n, auto lanes) {
        terms += first<C>(target.spread(p, n, lanes) * (level - (load(x + n, lanes) - top)), lanes, C(0));
    });
    return loss + sum(terms);
}

// dx, which may lie where x does: also as numbers of a narrower type at the same address.
template <class T, class X, class Out>
void gradient_of_row(const Target<T>& target, const X* x, const T* p, Out* dx, int64_t row, Normaliser<compute_t<T>> at, compute_t<T> g) {
    using C = compute_t<T>;
    int64_t label = target.labels && target.keeps(row) ? target.labels[row] : -1;
    C asked = label >= 0 ? target.asked(label) : 0, of_label = label >= 0 ? number(x + label) : 0;
    if (p) {
        vec<C> terms{};
        each_vector<C>(target.N, [&](int64_t n, auto lanes) { terms += first<C>(target.spread(p, n, lanes), lanes, C(0)); });
        asked = sum(terms);
    }
    if (!target.keeps(row)) g = 0;
    const vec<C> top = set(at.top), scale = set(g * asked / at.sum), slope = set(g);
    auto softmax = [&](vec<C> v) { return exp_nonpositive<C>(v - top) * scale; };
    if (target.spreads())
        each_vector<C>(target.N, [&](int64_t n, auto lanes) {
            store(dx + n, softmax(load(x + n, lanes)) - slope * target.spread(p, n, lanes), lanes);
        });
    else
        each_vector<C>(target.N, [&](int64_t n, auto lanes) { store(dx + n, softmax(load(x + n, lanes)), lanes); });
    if (label < 0) return;
    C q = target.peak(label) + (target.smoothing > 0 ? target.smoothing / target.N * target.weight_of(label) : 0);
    store(dx + label, softmax(set(of_label)) - set(g * q), 1);
}

// dprobs[n] = g w[n] (1 - s) (log(sum) - (x[n] - top))
template <class T> void target_gradient_of_row(const Target<T>& target, const T* x, T* dp, Normaliser<compute_t<T>> at, compute_t<T> g) {
    using C = compute_t<T>;
    const vec<C> top = set(at.top), level = set(log_of(at.sum)), slope = set(g * (1 - target.smoothing));
    each_vector<C>(target.N, [&](int64_t n, auto lanes) {
        vec<C> v = slope * (level - (load(x + n, lanes) - top));
        store(dp + n, target.weight ? v * load(target.weight + n, lanes) : v, lanes);
    });
}
