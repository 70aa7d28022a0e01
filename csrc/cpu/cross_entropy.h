// Cross-entropy of a tile of rows of logits: what the target asks for, the losses, and the gradients.
//
//     q[n]        what the target asks of class n:  w[n] ((1 - s) p[n] + s / N)           p: probabilities, or 1 at the label, 0 elsewhere
//     loss      = sum_n q[n] (log(sum) - (x[n] - top))                                    top, sum: see softmax.h; s: smoothing
//     dx[n]     = g (Q e^(x[n] - top) / sum - q[n]),   Q = sum_n q[n]                      g: the gradient of this row's loss
//     dp[n]     = g w[n] (1 - s) (log(sum) - (x[n] - top))
//
// A label asks for one class, so q is `peak` there, plus `spread`, which smoothing or probabilities ask of every class. Without spread no
// class but the label's is looked at twice. A row whose label is ignored has q = 0.
#pragma once
#include "softmax.h"

template <class T> struct Target {
    using C = compute_t<T>;
    const int64_t* labels;  // of every row, or null, then
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
    bool keeps(int64_t row) const { return !labels || labels[row] != ignored; }
    C weight_of(int64_t n) const { return weight ? number(weight + n) : C(1); }
    C peak(int64_t label) const { return (1 - smoothing) * weight_of(label); }
    C asked(int64_t label) const { return peak(label) + smoothing / N * weights; }  // Q

    // spread[n] of the vector at `at`
    template <class Tile, class Lanes> vec<C> spread(const Tile& tile, int64_t at, int64_t n, Lanes lanes) const {
        vec<C> q = set(smoothing / N);
        if (probs) q += (1 - smoothing) * load(probs + at, lanes);
        if (weight) q *= tile.of_class(weight, n, lanes);
        return q;
    }
};

// The losses of a tile that begins at x[at], with row `row`; its normalisers go to tops and sums, which begin at row 0.
template <class T, class X, class Tile>
void tile_losses(const Tile& tile, const Target<T>& target, const X* x, int64_t at, int64_t row, compute_t<T>* tops, compute_t<T>* sums,
                 compute_t<T>* losses) {
    using C = compute_t<T>;
    using V = typename Tile::V;
    V top[Tile::U], level[Tile::U], loss[Tile::U] = {}, of_label[Tile::U] = {}, peak[Tile::U] = {}, keep[Tile::U] = {};
    normalise(tile, x + at, top, level, [](int64_t, int, auto, V) {});
    for (int u = 0; u < Tile::U; u++) {
        tile.put(tops + row, u, top[u]), tile.put(sums + row, u, level[u]);
        level[u] = log<C>(level[u]);
    }
    if (target.spreads()) {
        tile.each([&](int64_t place, int64_t n, int u, auto lanes) {
            V q = target.spread(tile, at + place, n, lanes);
            loss[u] += tile.only(q * (level[u] - (load(x + at + place, lanes) - top[u])), lanes, 0);
        });
        for (auto& l : loss) l = tile.sum(l);
    }
    if (target.labels) {
        tile.each_row([&](int64_t r, int u, int lane) {
            int64_t label = target.labels[row + r];
            if (label == target.ignored) return;
            keep[u][lane] = 1, peak[u][lane] = target.peak(label), of_label[u][lane] = number(x + at + tile.place(r, label));
        });
        for (int u = 0; u < Tile::U; u++) {
            V of_row = loss[u] + peak[u] * (level[u] - (of_label[u] - top[u]));
            loss[u] = keep[u] > 0 ? of_row : V{};
        }
    }
    for (int u = 0; u < Tile::U; u++) tile.put(losses + row, u, loss[u]);
}

// dx and dp, where not null. g[u]: the gradients of the losses. dx may lie where x does: one row also as a narrower type.
template <class T, class X, class Tile>
void tile_gradients(const Tile& tile, const Target<T>& target, const X* x, T* dx, T* dp, int64_t at, int64_t row, const compute_t<T>* tops,
                    const compute_t<T>* sums, typename Tile::V (&g)[Tile::U]) {
    using C = compute_t<T>;
    using V = typename Tile::V;
    V top[Tile::U], asked[Tile::U] = {}, scale[Tile::U], pull[Tile::U] = {};
    vec<ints<C>> label[Tile::U];
    for (int u = 0; u < Tile::U; u++) label[u] = set(ints<C>(-1)), top[u] = tile.get(tops + row, u);
    if (target.labels) {
        tile.each_row([&](int64_t r, int u, int lane) {
            int64_t n = target.labels[row + r];
            if (n == target.ignored) g[u][lane] = 0;
            else label[u][lane] = n, asked[u][lane] = target.asked(n), pull[u][lane] = target.peak(n);
        });
        for (int u = 0; u < Tile::U; u++) {
            g[u] = tile.spread(g[u]), asked[u] = tile.spread(asked[u]), label[u] = tile.spread(label[u]);
            pull[u] = g[u] * tile.spread(pull[u]);
        }
    } else {
        tile.each([&](int64_t place, int64_t n, int u, auto lanes) {
            asked[u] += tile.only(target.spread(tile, at + place, n, lanes), lanes, 0);
        });
        for (auto& a : asked) a = tile.sum(a);
    }
    for (int u = 0; u < Tile::U; u++) scale[u] = g[u] * asked[u] / tile.get(sums + row, u);
    auto gradient = [&](auto spreads, auto labels) {
        tile.each([&](int64_t place, int64_t n, int u, auto lanes) {
            prefetch_l2(x + at + place + tile.numbers());
            V v = exp_nonpositive<T>(load(x + at + place, lanes) - top[u]) * scale[u];
            if (spreads()) v -= g[u] * target.spread(tile, at + place, n, lanes);
            if (labels()) v = tile.class_numbers(n) == label[u] ? v - pull[u] : v;
            store(dx + at + place, v, lanes);
        });
    };
    std::true_type yes;
    std::false_type no;
    if (dx && !target.labels) gradient(yes, no);
    else if (dx && target.spreads()) gradient(yes, yes);
    else if (dx) gradient(no, yes);
    if (!dp) return;
    for (int u = 0; u < Tile::U; u++) scale[u] = log<C>(tile.get(sums + row, u)), pull[u] = g[u] * (1 - target.smoothing);
    tile.each([&](int64_t place, int64_t n, int u, auto lanes) {
        V v = pull[u] * (scale[u] - (load(x + at + place, lanes) - top[u]));
        store(dp + at + place, target.weight ? v * tile.of_class(target.weight, n, lanes) : v, lanes);
    });
}

// ---- the arguments of a loss on classes, checked -----------------------------------------------------------------------------------

enum Reduction { NO_REDUCTION, MEAN, SUM, REDUCTIONS };

// Every label a class, or ignored. `labels` is contiguous.
inline void check_labels(const char* op, const Tensor& labels, int64_t N, int64_t ignored) {
    auto label = static_cast<const int64_t*>(labels.data_ptr());
    auto wrong = [=](int64_t row) { return (uint64_t(label[row]) >= uint64_t(N)) & (label[row] != ignored); };
    int64_t R = labels.numel();
    bool any = false;
    for (int64_t row = 0; row < R; row++) any |= wrong(row);
    for (int64_t row = 0; any && row < R; row++)
        if (wrong(row))
            fail(op, ": Target ", label[row], " is out of bounds: number ", row, " of target must be 0 to ", N - 1, " for the ", N,
                 " classes of input, or ignore_index, ", ignored);
}

struct LossArguments {
    Classes size;
    std::vector<int64_t> row_shape;  // of the losses: the input's without its classes
    Tensor x, target, weight;
    bool labels;
    int64_t reduction, ignored;
    int64_t rows() const { return size.M * size.D; }
    int64_t losses() const { return reduction ? 0 : row_shape.size(); }  // how many dimensions the result has

    LossArguments(const char* op, const Tensor& logits, const Tensor& target_, const std::optional<Tensor>& weight_, int64_t reduction,
                  int64_t ignored)
        : size(logits, logits.dim() > 1), reduction(reduction), ignored(ignored) {
        if (logits.dim() == 0) fail(op, ": x must have at least 1 dimension");
        checked_like(op, "x", logits, logits);
        for (int64_t i = 0; i < logits.dim(); i++)
            if (i != (logits.dim() > 1)) row_shape.push_back(logits.size(i));
        if (!target_.defined()) fail(op, ": target is undefined, needs a tensor");
        labels = target_.scalar_type() == ScalarType::Long;
        if (labels) checked(op, "target", target_, ScalarType::Long, row_shape.data(), row_shape.size());
        else checked_like(op, "target", target_, logits);
        if (weight_) checked(op, "weight", *weight_, logits.scalar_type(), {size.N});
        if (size.N == 0 || size.N > INT32_MAX) fail(op, ": x has ", size.N, " classes, needs 1 to ", INT32_MAX);
        if (reduction < 0 || reduction >= REDUCTIONS) fail(op, ": reduction has code ", reduction, ", needs 0 to ", REDUCTIONS - 1);
        x = dense(logits), target = dense(target_), weight = weight_ ? dense(*weight_) : Tensor();
        if (labels) check_labels(op, target, size.N, ignored);
    }
    template <class T> Target<T> as(double smoothing) const {
        auto numbers = static_cast<const T*>(target.data_ptr());
        return {labels ? static_cast<const int64_t*>(target.data_ptr()) : nullptr, labels ? nullptr : numbers,
                weight.defined() ? static_cast<const T*>(weight.data_ptr()) : nullptr, smoothing, ignored, size.N};
    }
};

template <class C> C total_of(const C* p, int64_t count) {
    return ordered_sum(count, [=](int64_t begin, int64_t end) {
        vec<C> terms{};
        each_vector<C>(end - begin, [&](int64_t n, auto lanes) { terms += load(p + begin + n, lanes); });
        return sum(terms);
    });
}

// What a reduction divides the losses of R rows by: for a mean the weights of the labels that count, or the number of rows.
template <class T> compute_t<T> divisor_of(const Target<T>& target, int64_t reduction, int64_t R) {
    using C = compute_t<T>;
    if (reduction != MEAN) return 1;
    if (!target.labels) return R;
    if (!target.weight) return R - std::count(target.labels, target.labels + R, target.ignored);
    std::vector<C> masses(R);
    for (int64_t r = 0; r < R; r++) masses[r] = target.keeps(r) ? target.weight_of(target.labels[r]) : 0;
    return total_of(masses.data(), R);
}

// The result of a loss from the losses of its rows.
template <class T> void reduce(int64_t reduction, int64_t R, const compute_t<T>* losses, compute_t<T> divisor, T* loss) {
    if (reduction) store(loss, set(total_of(losses, R) / divisor), 1);
    else each_vector<compute_t<T>>(R, [&](int64_t r, auto lanes) { store(loss + r, load(losses + r, lanes), lanes); });
}
