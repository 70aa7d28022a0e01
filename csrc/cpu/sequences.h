// What a recurrent layer goes through: where tokens lie, who takes which sequences, and W_hh in panels.
#pragma once
#include <atomic>
#include <thread>
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

// The threads that go through one share together, where there are more threads than shares: each computes some units of every step, with
// weights that stay in its own cache, and waits until the others have theirs. Who has waited for long computes what nobody has begun, so
// that all goes on where a thread comes late or never.
class Team {
    struct alignas(64) Piece {
        std::atomic<int64_t> next = 0;  // the number of the step that it is to be computed for
    };
    std::vector<Piece> pieces;
    alignas(64) std::atomic<int64_t> done = 0;  // pieces, of all steps

  public:
    explicit Team(int64_t members) : pieces(members) {}
    int64_t members() const { return int64_t(pieces.size()); }
    // One of the members at step number `step`, counted from 0: compute(piece) for its own piece, until those of all are there.
    template <class Compute> void go(int64_t member, int64_t step, const Compute& compute) {
        constexpr int LONG = 1 << 12;
        if (members() == 1) return compute(0);
        auto take = [&](int64_t i) {
            int64_t expected = step;
            if (!pieces[i].next.compare_exchange_strong(expected, step + 1)) return;
            compute(i);
            done.fetch_add(1, std::memory_order_release);
        };
        take(member);
        for (int looks = 1; done.load(std::memory_order_acquire) < (step + 1) * members(); looks++)
            if (looks % LONG == 0) {
                for (int64_t i = 0; i < members(); i++) take(i);
                std::this_thread::yield();
            }
    }
};
// How many threads each share gets, where a step takes `work` multiply-adds: to wait for one another has to pay.
inline int64_t team_size(int64_t shares, int64_t threads, int64_t work) {
    constexpr int64_t PAYS = 1 << 16;
    return std::clamp<int64_t>(threads / shares, 1, std::max<int64_t>(1, work / PAYS));
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
    // n rows of a times panels [i0, i1), counted from the first gate of block b on: the sums of row j and panel i go to
    // sums[j * ld + (i - i0) NR], or are added to what is there.
    void multiply(int64_t n, const E* a, int64_t lda, int64_t b, int64_t i0, int64_t i1, Sum* sums, int64_t ld, bool add = false) const {
        constexpr int64_t PER = sizeof(Lane) / sizeof(E);
        if (n == 0) return;
        for (int64_t k = 0; k < K; k += KC, add = true) {
            int kc = std::min<int64_t>(KC, K - k);
            auto panel = [&](int64_t i) {
                return p + (b + i / gates) * block() + gates * Micro::panel(NR, k) + i % gates * Micro::panel(NR, kc);
            };
            Strided<Lane> rows{reinterpret_cast<const Lane*>(a + k), lda / PER};
            if (n < FEW) {
                few_rows(int(n), kc, rows, panel, i0, i1, sums, ld, add);
                continue;
            }
            for (int64_t i = i0; i < i1; i++)
                for (int64_t j = 0; j < n; j += MR) {
                    Strided<Lane> some{rows.p + j * rows.step, rows.step};
                    Spaced<Lane> columns{reinterpret_cast<const Lane*>(panel(i)), NR};
                    const E* next = panel(i) + Micro::panel(NR, kc);
                    auto tile = [&](auto micro) {
                        micro.tile_at(std::min<int64_t>(MR, n - j), kc, some, columns, sums + j * ld + (i - i0) * NR, ld, add, next);
                    };
                    if (units - (b + i / gates) * NR > VL<Sum>) tile(Micro{});
                    else tile(typename one_vector<Micro>::type{});
                }
        }
    }

    // Up to 3 rows give a tile too few sums to add to while it waits for the last addition: several panels side by side give more.
    static constexpr int FEW = 4, TOGETHER = 4, VECTORS = NR / VL<Sum>;
    template <class Panel>
    static void few_rows(int n, int kc, Strided<Lane> rows, const Panel& panel, int64_t i0, int64_t i1, Sum* sums, int64_t ld,
                         bool add) {
        const int most = std::min(TOGETHER, MR / n);  // whose sums are in registers
        for (int64_t i = i0; i < i1; i += most) {
            const Lane* w[TOGETHER];
            int many = int(std::min<int64_t>(most, i1 - i));
            for (int q = 0; q < many; q++) w[q] = reinterpret_cast<const Lane*>(panel(i + q));
            auto choose = [&]<int... I>(std::integer_sequence<int, I...>) {
                ((n == I / TOGETHER + 1 && many == I % TOGETHER + 1
                      ? together<I / TOGETHER + 1, I % TOGETHER + 1>(kc, rows, w, sums + (i - i0) * NR, ld, add) : void()), ...);
            };
            choose(std::make_integer_sequence<int, (FEW - 1) * TOGETHER>{});
        }
    }
    template <int R, int P> static void together(int kc, Strided<Lane> rows, const Lane* const* w, Sum* sums, int64_t ld, bool add) {
        vec<Sum> acc[R][P * VECTORS] = {};
        for (int k = 0; k < ceil_div(kc, int(sizeof(Lane) / sizeof(E))); k++)
#pragma GCC unroll 4
            for (int q = 0; q < P; q++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 4
                    for (int r = 0; r < R; r++)
                        acc[r][q * VECTORS + v] =
                            Micro::multiply_add(acc[r][q * VECTORS + v], rows.of(rows[k], r), w[q] + k * NR + v * VL<Sum>);
        put(acc, sums, ld, add);
    }
};

// What the steps multiply with, for each direction: W_hh and, where h is projected, W_hr; as they are or, for the way back, transposed.
// Forward, where many sequences run at once, W_ih too.
template <class Micro> struct StepWeights {
    Panels<Micro> hh[2] = {}, hr[2] = {}, ih[2] = {};
};

}  // namespace recurrent
