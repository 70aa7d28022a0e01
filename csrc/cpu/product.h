// The product of matrices that lie in memory as they are stored: what linear.cpp and whatever else multiplies tensors puts around gemm.h.
#pragma once
#include "activation.h"
#include "gemm_thin.h"
#include "op.h"

constexpr double PARTS_PAY = 128;  // harmonic size from which splitting numbers into parts costs less than it saves
constexpr int READ = 3;  // the scratch slot of the readers
template <class T> using element_of = typename micro_for<T, true>::type::Element;

// A matrix in memory: element (i, j) is p[i * rs + j * cs].
template <class T> struct Matrix {
    T* p;
    int64_t rs, cs;
    Matrix transposed() const { return {p, cs, rs}; }
};
template <class T> Matrix<T> matrix(const Tensor& t) { return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1)}; }

// Read a stored matrix: as it lies where the product computes in its type, widened into scratch otherwise.
template <class E, class T> Block<E> read(Matrix<T> x, int64_t r0, int rows, int64_t k0, int kc) {
    const T* p = x.p + r0 * x.rs + k0 * x.cs;
    if constexpr (std::is_same_v<T, E>) return {p, x.rs, x.cs};
    bool along_k = x.cs == 1;
    int outer = along_k ? rows : kc, inner = along_k ? kc : rows;
    int64_t stride = along_k ? x.rs : x.cs, ld = round_up(inner, VL<E>);
    E* out = scratch<E, READ>(outer * ld);
    for (int i = 0; i < outer; i++)
        for (int j = 0; j < inner; j += VL<E>) store(out + i * ld + j, load(p + i * stride + j, inner - j));
    return along_k ? Block<E>{out, ld, 1} : Block<E>{out, 1, ld};
}

template <class E, class T> auto reader(Matrix<T> x) {
    return [x](int64_t r0, int rows, int64_t k0, int kc) { return read<E>(x, r0, rows, k0, kc); };
}

// out = epilogue(A B), by the micro-kernel that suits the type and the size. `deep` k are packed at a time.
template <class T, class FA, class FB, class Out, class F>
void multiply(int64_t M, int64_t N, int64_t K, const FA& A, const FB& B, Out* out, const F& epilogue, int64_t threads = ::threads(),
              int64_t deep = 8192) {
    auto run = [&](auto micro) {
        using Micro = decltype(micro);
        Gemm<Micro> gemm{M, N, K, A, B, epilogue, deep};
        if constexpr (!std::is_void_v<Out>) gemm.out = out, gemm.out_size = sizeof(Out);
        if constexpr (std::is_same_v<Out, typename Micro::Sum>) gemm.sums = out;
        gemm.run(threads, [](int64_t n, const auto& body) { parallel(n, body); });
    };
    if (double(M) * N >= PARTS_PAY * (M + N) && K >= 64) run(typename micro_for<T, true>::type{});
    else run(typename micro_for<T, false>::type{});
}

// How the thin products spread over the threads.
inline auto split(int64_t M, int64_t N, int64_t K) {
    bool serial = double(M) * N * K < SERIAL;
    return [=](int64_t n, const auto& body) { parallel(n, body, serial); };
}

// Whether the thin products beat packing for M rows and k contiguous in both operands: sums across lanes need many k to pay, and a widened
// half type costs more to read than to multiply.
template <class T> bool is_thin(int64_t M, int64_t K) {
    constexpr bool WIDENED = sizeof(T) == 2 && !Dot<T>::PAIRS;
    if constexpr (HAS_TILES && std::is_same_v<T, bf16>)
        if (M <= 32 && K > 0) return true;
    return M <= 4 || (M <= (WIDENED ? 32 : 64) && K >= 256);
}

// Whether A w^T is best computed transposed, with w where it lies: A fills the vectors, and is small enough to stay in the L2 cache. The
// rows of w are contiguous or, unless its numbers are taken in pairs, its columns.
template <class T> constexpr bool CAN_TURN = !HAS_TILES && std::is_same_v<element_of<T>, T>;
template <class T> bool turns(int64_t M, int64_t N, int64_t K, Matrix<T> w) {
    constexpr int64_t NR = micro_for<T, true>::type::NR, LARGEST = 512 << 10;  // bytes of A
    if (std::is_same_v<T, bf16> && ((K | w.rs) % 2 || w.cs != 1)) return false;
    if (w.cs != 1 && w.cs * sizeof(T) % 2048 == 0 && K > 256 && M > NR) return false;  // its lines would compete for the same places in L2
    return N >= NR && K >= 64 && M * K * int64_t(sizeof(T)) <= LARGEST && 8 * M >= 7 * round_up(M, NR);
}
template <class T, class F> void multiply_turned(int64_t M, int64_t N, int64_t K, Reader<T> A, Matrix<T> w, const F& epilogue) {
    turned_product<typename micro_for<T, true>::type>(M, N, K, A, {w.p, w.rs, w.cs}, epilogue, split(M, N, K));
}

// out = epilogue(x W^T).
template <class T, class Out, class F>
void multiply_rows(int64_t M, int64_t N, int64_t K, Matrix<T> x, Matrix<T> weight, Out* out, const F& epilogue) {
    using E = element_of<T>;
    if constexpr (CAN_TURN<T>)
        if (turns(M, N, K, weight)) return multiply_turned<T>(M, N, K, reader<T>(x), weight, epilogue);
    if (x.cs != 1 || weight.cs != 1 || !is_thin<T>(M, K)) return multiply<T>(M, N, K, reader<E>(x), reader<E>(weight), out, epilogue);
    if constexpr (HAS_TILES && std::is_same_v<T, bf16>)
        if (M <= 32 && K > 0) return tile_product(M, N, K, x.p, x.rs, weight.p, weight.rs, epilogue, split(M, N, K));
    dot_product(M, N, K, x.p, x.rs, weight.p, weight.rs, epilogue, split(M, N, K));
}

// out = epilogue(A B), with A and B functions of the element type that give readers; the columns of B are contiguous, if `rows`.
template <class T, class FA, class FB, class Out, class F>
void multiply_columns(int64_t M, int64_t N, int64_t K, const FA& A, const FB& B, bool rows, Out* out, const F& epilogue) {
    using Thin = std::conditional_t<Dot<T>::PAIRS, PairDot<bf16>, Fma<compute_t<T>>>;
    constexpr int64_t SWEEP_ROWS = 16;
    if (M <= SWEEP_ROWS && rows) {
        using E = typename Thin::Element;
        sweep_product<Thin>(M, N, K, A(E{}), B(E{}), epilogue, split(M, N, K));
    } else {
        using E = element_of<T>;
        multiply<T>(M, N, K, A(E{}), B(E{}), out, epilogue);
    }
}
template <class T, class FA, class Out, class F>
void multiply_columns(int64_t M, int64_t N, int64_t K, const FA& A, Matrix<T> weight, Out* out, const F& epilogue) {
    if constexpr (CAN_TURN<T>)
        if (turns(M, N, K, weight.transposed())) return multiply_turned<T>(M, N, K, A(T{}), weight.transposed(), epilogue);
    auto B = [=](auto element) { return reader<decltype(element)>(weight.transposed()); };
    multiply_columns<T>(M, N, K, A, B, weight.cs == 1, out, epilogue);
}

// The epilogue of a product without one: store the tile.
template <class T, class Sum> void store_tile(const Tile<Sum>& t, T* out, int64_t ld) {
    for (int i = 0; i < t.rows; i++)
        for (int j = 0; j < t.columns; j += VL<Sum>)
            store(out + (t.m + i) * ld + t.n + j, load(t.p + i * t.ld + j), t.columns - j);
}

// What an epilogue may apply.
inline Activation checked_activation(const char* op, int64_t code, double slope) {
    if (code < 0 || code >= EPILOGUES) fail(op, ": activation has code ", code, ", needs 0 to ", EPILOGUES - 1);
    return {int(code), slope};
}
