// What a recurrent layer goes through: where tokens lie, who takes which sequences, and W_hh in panels.
#pragma once
#include <vector>

#include "product.h"
#include "rows.h"

namespace recurrent {

template <class T> using step_micro = std::conditional_t<HAS_PAIR_DOT && std::is_same_v<T, bf16>, PairDot<bf16>, Fma<compute_t<T>>>;

// Where tokens lie: those of a time step side by side, the longest sequence first.
struct Tokens {
    int64_t T = 0, B = 0, N = 0;
    std::vector<int64_t> size, offset;  // of each step: sequences that still run, number of its first token

    int64_t step(bool up, int64_t p) const { return up ? p : T - 1 - p; }  // the p-th step in either order
    // The token next to that of sequence b at step t, one step earlier or later; -1 where there is none.
    int64_t beside(int64_t t, int64_t b, bool later) const {
        t += later ? 1 : -1;
        return t >= 0 && t < T && b < size[t] ? offset[t] + b : -1;
    }
};

// Some sequences in one direction: every stride-th from the first, so that long and short ones are shared out.
struct Share {
    int64_t d, first, stride, count, base;  // base: how many rows of this direction belong to the shares before
    int64_t sequence(int64_t j) const { return first + j * stride; }
    int64_t running(int64_t size) const { return std::clamp<int64_t>((size - first + stride - 1) / stride, 0, count); }
};
inline std::vector<Share> shares(int64_t D, int64_t B, int64_t threads) {
    std::vector<Share> all;
    int64_t each = std::max<int64_t>(1, std::min(B, (threads + D - 1) / D));
    for (int64_t d = 0; d < D; d++)
        for (int64_t first = 0, base = 0; first < each; first++) {
            int64_t count = (B - first + each - 1) / each;
            all.push_back({d, first, each, count, base});
            base += count;
        }
    return all;
}

// W in panels: for every NR units, for every KC of k, one for each gate.
template <class Micro> struct Panels {
    using E = typename Micro::Element;
    using Sum = typename Micro::Sum;
    using Lane = typename Micro::Lane;
    static constexpr int NR = Micro::NR, MR = Micro::MR, KC = Micro::KC;

    int64_t units, K, gates;
    E* p = nullptr;

    int64_t blocks() const { return ceil_div(units, NR); }
    int64_t block() const { return gates * Micro::panel(NR, K); }
    int64_t room() const { return blocks() * block(); }

    // read(gate, unit, columns, k, kc): the Block of W for some units of a gate
    template <class Read> void pack(const Read& read) const {
        auto some = [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; b++) {
                E* at = p + b * block();
                int columns = std::min<int64_t>(NR, units - b * NR);
                for (int64_t k = 0; k < K; k += KC)
                    for (int g = 0; g < gates; g++) {
                        int kc = std::min<int64_t>(KC, K - k);
                        Micro::pack_b(read(g, b * NR, columns, k, kc), columns, kc, at);
                        at += Micro::panel(NR, kc);
                    }
            }
        };
        parallel(blocks(), some, units * K * gates <= SERIAL_NUMBERS);
    }
    // sums[j][gate NR + i] = sum_k a[j][k] W[unit i of block b][k] for n rows of a
    void multiply(int64_t n, const E* a, int64_t lda, int64_t b, Sum* sums) const {
        constexpr int64_t PER = sizeof(Lane) / sizeof(E);
        const E* panel = p + b * block();
        for (int64_t k = 0; k < K; k += KC)
            for (int g = 0; g < gates; g++) {
                int kc = std::min<int64_t>(KC, K - k);
                const E* next = panel + Micro::panel(NR, kc);
                for (int64_t j = 0; j < n; j += MR) {
                    Strided<Lane> rows{reinterpret_cast<const Lane*>(a + j * lda + k), lda / PER};
                    Spaced<Lane> columns{reinterpret_cast<const Lane*>(panel), NR};
                    Micro::tile_at(std::min<int64_t>(MR, n - j), kc, rows, columns, sums + (j * gates + g) * NR, gates * NR, k > 0, next);
                }
                panel = next;
            }
    }
};

// What the steps multiply with, for each direction: W_hh and, where h is projected, W_hr; as they are or, for the way back, transposed.
template <class Micro> struct StepWeights {
    Panels<Micro> hh[2] = {}, hr[2] = {};
};

}  // namespace recurrent
