// The AMX micro-kernels inside the product, on emulated tiles, against sums in double. Prints what is wrong; exits with the number of it.
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "gemm_thin.h"

static float value(float x) { return x; }
static float value(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
static void assign(float& x, float v) { x = v; }
static void assign(bf16& x, float v) { x.bits = bits_as<uint32_t>(v) >> 16; }

// One operand of r rows and k: random numbers, small whole ones that every sum holds exactly, or numbers of which one is infinite.
enum Fill { WHOLE, NORMAL, INFINITE };
template <class E> struct Operand {
    int64_t rows, K;
    bool along_k;  // which index is contiguous
    std::vector<E> numbers = std::vector<E>(rows * K + 64);
    Operand(int64_t rows, int64_t K, bool along_k, Fill fill, unsigned seed) : rows(rows), K(K), along_k(along_k) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < rows * K; i++) assign(numbers[i], fill == WHOLE ? int(generator() % 7) - 3 : normal(generator));
        if (fill == INFINITE && rows * K) assign(numbers[rows * K / 2], INFINITY);
    }
    Block<E> block(int64_t r, int64_t k) const {
        return along_k ? Block<E>{&numbers[r * K + k], K, 1} : Block<E>{&numbers[k * rows + r], 1, rows};
    }
    float operator()(int64_t r, int64_t k) const { return value(numbers[along_k ? r * K + k : k * rows + r]); }
};

static const auto parallel = [](int64_t n, const auto& body) {
    std::vector<std::thread> team;
    for (int64_t t = 0; t < n; t++) team.emplace_back([&, t] { body(t, t + 1); });
    for (auto& thread : team) thread.join();
};

template <class E>
static int compare(const char* what, const Operand<E>& a, const Operand<E>& b, const std::vector<float>& c, Fill fill) {
    int64_t M = a.rows, N = b.rows, K = a.K, wrong = 0;
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double exact = 0, size = 1e-30;
            for (int64_t k = 0; k < K; k++) exact += double(a(m, k)) * b(n, k), size += std::abs(double(a(m, k)) * b(n, k));
            float got = c[m * N + n];
            wrong += std::isfinite(exact) ? !(std::abs(got - exact) <= (fill == WHOLE ? 0 : 3e-6 * size)) : std::isfinite(got);
        }
    if (wrong) printf("%s %ld x %ld x %ld: %ld of %ld numbers are wrong\n", what, long(M), long(K), long(N), long(wrong), long(M * N));
    return wrong > 0;
}

template <class Micro> static int product(const char* what, int64_t M, int64_t K, int64_t N, int layout, int threads, Fill fill) {
    using E = typename Micro::Element;
    Operand<E> a(M, K, layout & 1, fill, 1), b(N, K, layout & 2, fill, 2);
    std::vector<float> c(M * N, NAN);
    auto A = [&](int64_t r, int, int64_t k, int) { return a.block(r, k); };
    auto B = [&](int64_t r, int, int64_t k, int) { return b.block(r, k); };
    auto epilogue = [&](const Tile<float>& t) {
        for (int i = 0; i < t.rows; i++)
            for (int j = 0; j < t.columns; j++) c[(t.m + i) * N + t.n + j] = t.p[i * t.ld + j];
    };
    Gemm<Micro>{M, N, K, A, B, epilogue}.run(threads, parallel);
    int wrong = compare(what, a, b, c, fill);
    if constexpr (std::is_same_v<E, bf16>)
        if (M <= 32 && K > 0 && layout == 3) {
            tile_product(M, N, K, a.numbers.data(), K, b.numbers.data(), K, epilogue, [](int64_t n, const auto& body) { body(0, n); });
            wrong += compare("thin bf16", a, b, c, fill);
        }
    return wrong;
}

int main() {
    int wrong = 0;
    using Sizes = std::vector<std::array<int64_t, 3>>;
    for (auto [M, K, N] : Sizes{{1, 1, 1}, {33, 37, 35}, {64, 64, 256}, {31, 129, 300}, {130, 260, 515}, {300, 33, 600}, {65, 0, 64}})
        for (int layout = 0; layout < 4; layout++)
            for (int threads = 1; threads <= 3; threads++) {
                wrong += product<Tiles<bf16, 1>>("bf16", M, K, N, layout, threads, WHOLE);
                wrong += product<Tiles<float, 2>>("float in two parts", M, K, N, layout, threads, WHOLE);
                for (Fill fill : {WHOLE, NORMAL, INFINITE}) wrong += product<Tiles<float, 3>>("float", M, K, N, layout, threads, fill);
            }
    for (auto [M, K, N] : Sizes{{70, 8200, 40}, {1040, 8200, 20}})  // packed in parts: of k, and of rows too
        wrong += product<Tiles<bf16, 1>>("bf16", M, K, N, 3, 2, WHOLE) + product<Tiles<float, 3>>("float", M, K, N, 0, 2, NORMAL);
    return wrong;
}
