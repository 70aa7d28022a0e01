// What slide.h does, back: the gradients of a band's places slid over its pixels, for the gradient of the filters.
//
//   sums[tap, m, c] += sum_j dz[m, j] met[offset[tap] + place[j], c]        j = the places of a band
//
// Where channels are too few to fill vectors, all k of a place are gathered first: one tap, c = k.
#pragma once
#include "slide.h"

// sums[tap][m][c] += dz[m][j] met[offset[tap] + place[j] + c] for all places j, `height` rows of L, of a band and filters [m0, m1); `width`
// lanes to a place. A list of places leaves out what lies between the rows: 0 times a number there would be NaN where that is infinite.
// Where a lane is a pair of numbers, it has what two places side by side meet, and the list has every second place.
template <class Micro, class T, Memory MEMORY>
void slide_back(const typename Micro::Lane* met, const std::vector<int64_t>& offset, const int64_t* place, int64_t height, int64_t L,
                int64_t width, const Images<T, MEMORY>& dz, int64_t m0, int64_t m1, int64_t n, int64_t i0, typename Micro::Sum* sums,
                bool add) {
    using E = typename Micro::Element;
    using Lane = typename Micro::Lane;
    constexpr int MR = Micro::MR, NR = Micro::NR, PAIR = sizeof(Lane) / sizeof(E);
    constexpr int64_t DEEP = 256;
    if (PAIR == 1) L *= height, height = 1;
    int64_t M = dz.channels, in_row = round_up(L, PAIR), J = height * in_row;
    E* a = scratch<E, 0>(ceil_div(m1 - m0, MR) * J * MR);
    Matrix<T> band{const_cast<T*>(dz.p) + n * dz.image() + i0 * dz.W * dz.pixel(), dz.channel(), dz.pixel()};
    for (int64_t m = m0; m < m1; m += MR)
        for (int64_t i = 0; i < height; i++)
            for (int64_t j = 0; j < L; j += DEEP) {
                int rows = int(std::min<int64_t>(MR, m1 - m)), kc = int(std::min(DEEP, L - j));
                Micro::pack_a(read<E>(band, m, rows, i * L + j, kc), rows, kc, a + (m - m0) * J + (i * in_row + j) * MR);
            }
    for (int64_t j = 0; j < J; j += DEEP)
        for (int64_t c = 0; c < width; c += NR)
            for (size_t tap = 0; tap < offset.size(); tap++)
                for (int64_t m = m0; m < m1; m += MR) {
                    const E* from = a + (m - m0) * J + j * MR;
                    Micro::tile_at(int(std::min<int64_t>(MR, m1 - m)), int(std::min(DEEP, J - j)),
                                   Spaced<Lane>{reinterpret_cast<const Lane*>(from), MR}, Listed<Lane>{met + offset[tap] + c, place + j / PAIR},
                                   sums + (int64_t(tap) * M + m) * width + c, width, add || j > 0, from);
                }
}

// sums[k][m] += met[j][k] dz[m][j] for K numbers gathered at each of J places, `width` numbers apart.
template <class Micro, class T, Memory MEMORY>
void slide_back_by_k(const typename Micro::Element* met, int64_t width, int64_t K, int64_t J, const Images<T, MEMORY>& dz, int64_t n, int64_t i0,
                     typename Micro::Sum* sums, bool add) {
    using E = typename Micro::Element;
    constexpr int MR = Micro::MR, NR = Micro::NR;
    constexpr int64_t DEEP = 256;
    int64_t M = dz.channels, ld = round_up(M, NR), tiles = ceil_div(K, MR);
    E* b = scratch<E, 1>(DEEP * NR);
    Matrix<T> band{const_cast<T*>(dz.p) + n * dz.image() + i0 * dz.W * dz.pixel(), dz.channel(), dz.pixel()};
    for (int64_t m = 0; m < M; m += NR)
        for (int64_t j = 0; j < J; j += DEEP) {
            int columns = int(std::min<int64_t>(NR, M - m)), kc = int(std::min(DEEP, J - j));
            Micro::pack_b(read<E>(band, m, columns, j, kc), columns, kc, b);
            for (int64_t t = 0; t < tiles; t++) {
                int64_t k = K * t / tiles, rows = K * (t + 1) / tiles - k;
                Micro::tile_at(int(rows), kc, Spaced<E>{met + j * width + k, width}, Spaced<E>{b, NR}, sums + k * ld + m, ld, add || j > 0, b);
            }
        }
}
