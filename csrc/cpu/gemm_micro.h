// Panels and the micro-kernel that multiplies them: what gemm.h drives.
//
//   Block, Reader   an operand where it lies, or where a reader put it
//   pack            its panels: [kc][MR] of A, [kc][NR] of B, padded with zeros
//   Fma             an MR x NR tile of sums, all in registers, from one panel of each
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "simd.h"
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// ---- small tools ---------------------------------------------------------------------------------------------------------------

template <class> class function_ref;
template <class R, class... Args> class function_ref<R(Args...)> {  // a borrowed callable: two pointers, no allocation
    const void* object;
    R (*call)(const void*, Args...);

  public:
    template <class F> function_ref(const F& f)
        : object(&f), call([](const void* o, Args... args) -> R { return (*static_cast<const F*>(o))(args...); }) {}
    R operator()(Args... args) const { return call(object, args...); }
};

// Scratch memory that lives as long as its thread; `Slot` tells buffers in use at the same time apart.
template <class E, int Slot> E* scratch(int64_t count) {
    struct Buffer {
        void* memory = nullptr;
        int64_t size = 0;
        ~Buffer() { free(memory); }
    };
    static thread_local Buffer buffer;
    int64_t size = count * int64_t(sizeof(E));
    if (size > buffer.size) {
        int64_t page = size < (1 << 20) ? 4096 : 2 << 20;
        size = (size + page - 1) / page * page;
        free(buffer.memory);
        buffer.size = 0;
        if (!(buffer.memory = aligned_alloc(page, size))) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (page > 4096) madvise(buffer.memory, size, MADV_HUGEPAGE);  // a walk over megabytes of panels would miss the TLB at every step
#endif
        buffer.size = size;
    }
#ifdef __SANITIZE_ADDRESS__  // nobody touches more than what was asked for last
    int64_t used = count * int64_t(sizeof(E));
    __asan_unpoison_memory_region(buffer.memory, used);
    __asan_poison_memory_region(static_cast<char*>(buffer.memory) + used, buffer.size - used);
#endif
    return static_cast<E*>(buffer.memory);
}
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// ---- readers and panels ----------------------------------------------------------------------------------------------------------

// Element (r, k) of an operand is p[r * rs + k * ks]; r is a row of A or a column of B, and rs or ks is 1.
template <class E> struct Block {
    const E* p;
    int64_t rs, ks;
};
template <class E> using Reader = function_ref<Block<E>(int64_t r0, int rows, int64_t k0, int kc)>;

// While one line of an operand is packed, the one AHEAD bytes (or, across its rows, ROWS_AHEAD rows) further on is on its way to L2: a
// panel's rows lie far apart, so the hardware does not see them coming. (L1 would be the wrong place: rows a power of two apart share its
// few ways.)
constexpr int AHEAD = 256, ROWS_AHEAD = 16;
template <class T> inline void prefetch_l2(const T* p) { __builtin_prefetch(p, 0, 2); }

// panel[k * W + r] = block(r, k), zero for r in [rows, W).
template <int W, class E> bool pack(Block<E> block, int rows, int kc, E* panel) {
    constexpr int L = VL<E>;
    if (block.rs == 1) {
        for (int k = 0; k < kc; k++)
            for (int r = 0; r < W; r += L) {
                prefetch_l2(block.p + (k + ROWS_AHEAD) * block.ks + r);
                store(panel + k * W + r, load(block.p + k * block.ks + r, std::max(rows - r, 0)), W - r);
            }
        return true;
    }
    for (int k = 0; k < kc; k += L)
        for (int r = 0; r < W; r += L) {
            vec<E> square[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) {
                const E* p = block.p + (r + i) * block.rs + k;
                prefetch_l2(p + AHEAD / sizeof(E));
                square[i] = r + i < rows ? load(p, kc - k) : vec<E>{};
            }
            transpose(square);
            for (int i = 0; i < std::min(L, kc - k); i++) store(panel + (k + i) * W + r, square[i], W - r);
        }
    return true;
}

// to[column][row] of a matrix [row][column], by whole vectors: behind its columns it may be read, and `to` has room for vectors.
template <class S> void turn(const S* from, int64_t from_ld, int64_t rows, int64_t columns, S* to, int64_t to_ld) {
    constexpr int V = VL<S>;
    for (int64_t c = 0; c < columns; c += V)
        for (int64_t r = 0; r < rows; r += V) {
            vec<S> square[V];
#pragma GCC unroll 16
            for (int s = 0; s < V; s++) square[s] = r + s < rows ? load(from + (r + s) * from_ld + c) : vec<S>{};
            transpose(square);
#pragma GCC unroll 16
            for (int s = 0; s < V; s++) store(to + (c + s) * to_ld + r, square[s]);
        }
}

// ---- the micro-kernel: an MR x NR tile from one panel of A and one of B --------------------------------------------------------------

// c[R, NV vectors] (+)= acc
template <class E, int R, int NV> inline void put(const vec<E> (&acc)[R][NV], E* c, int64_t ldc, bool add) {
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
            E* at = c + i * ldc + j * VL<E>;
            store(at, add ? load(at) + acc[i][j] : acc[i][j]);
        }
}
template <class Micro, class A, class B, int... R> auto tile_for(int rows, std::integer_sequence<int, R...>) {  // a function for each height
    static constexpr decltype(&Micro::template tile_of<1, A, B>) table[] = {&Micro::template tile_of<R + 1, A, B>...};
    return table[rows - 1];
}
// Where the numbers for k begin: at equal distances, as in a panel, or wherever a list says. They lie side by side or wherever another does.
template <class E> struct Spaced {
    const E* p;
    int64_t step;
    const E* operator[](int k) const { return p + k * step; }
    static E of(const E* column, int i) { return column[i]; }
};
template <class E> struct Listed {
    const E* p;
    const int64_t* offset;
    const E* operator[](int k) const { return p + offset[k]; }
    static E of(const E* column, int i) { return column[i]; }
};
template <class E> struct Scattered {  // for A: one number is taken at a time
    const E* p;
    const int64_t *offset, *place;
    const E* operator[](int k) const { return p + offset[k]; }
    E of(const E* column, int i) const { return column[place[i]]; }
};
template <class Lane> struct Strided {  // for A: rows as they lie in memory, k side by side
    const Lane* p;
    int64_t step;
    const Lane* operator[](int k) const { return p + k; }
    Lane of(const Lane* column, int i) const { return column[i * step]; }
};

template <class E, int NV = ::NV> struct Fma {
    using Element = E;
    using Sum = E;
    static constexpr int MR = ::MR, NR = NV * VL<E>;
    using Lane = E;  // what a row of B is made of
    static constexpr int KC = 1536 / sizeof(E), MC = 8 * MR, NC = 16 * VL<E>;

    struct Session {};  // set up once per rectangle; AMX has something to do there
    static int64_t panel(int64_t width, int64_t kc) { return width * kc; }  // elements in a panel
    // Packing says whether this micro-kernel can multiply what it read; the vector units take every number.
    static bool pack_a(Block<E> block, int rows, int kc, E* panel) { return pack<MR>(block, rows, kc, panel); }
    static bool pack_b(Block<E> block, int columns, int kc, E* panel) { return pack<NR>(block, columns, kc, panel); }
    static constexpr bool writes_exactly(int) { return true; }  // the tile touches only the rows it was asked for
    static INLINE vec<E> multiply_add(vec<E> sum, E a, const E* row) { return sum + set(a) * load(row); }

    template <int R, class A, class B> static void tile_of(int kc, A a, B b, E* c, int64_t ldc, bool add, const E* next) {
        vec<E> acc[R][NV] = {};
        for (int i = 0; i < R; i++)
            for (int j = 0; j < NV; j++) __builtin_prefetch(c + i * ldc + j * VL<E>, 1);
        for (int k = 0; k < kc; k++, next += VL<E>) {
            prefetch_l2(next);
            const E *column = a[k], *row = b[k];
            vec<E> bk[NV];
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) bk[j] = load(row + j * VL<E>);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 8
                for (int j = 0; j < NV; j++) acc[i][j] += set(a.of(column, i)) * bk[j];
        }
        put(acc, c, ldc, add);
    }
    // c[rows, NR] (+)= A B; a vector of `next` per k is fetched into L2 meanwhile
    template <class A, class B> static void tile_at(int rows, int kc, A a, B b, E* c, int64_t ldc, bool add, const E* next) {
        tile_for<Fma, A, B>(rows, std::make_integer_sequence<int, MR>{})(kc, a, b, c, ldc, add, next);
    }
    static void tile(int rows, int, int kc, const E* a, const E* b, E* c, int64_t ldc, bool add, const E* next) {
        tile_at(rows, kc, Spaced<E>{a, MR}, Spaced<E>{b, NR}, c, ldc, add, next);
    }
};
