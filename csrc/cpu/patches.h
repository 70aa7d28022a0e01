// The matrix of patches that makes a convolution a product, never written down: element (k, j) is what tap k of the filter meets when the
// filter lies at place j. A reader gathers the part that gemm.h is about to pack. For filters of one pixel, whose patches are the image,
// and for AMX, whose tiles want their operands in an order of their own; grid.h has the other way.
//
//   place j = (n, i, l)    image, row and column of the filter's place           k = (c, t, u)   channel, row and column of a tap
//   (k, j) = image n, channel c, pixel (i * step + at[t], l * step + at[u]), each along its own Axis; 0 outside the image
//
//   images in rows      (N, C, H, W) in memory: places that follow one another lie side by side, gathered as [k][place]
//   images in columns   (N, H, W, C) in memory: channels lie side by side, k = (t, u, c), gathered as [place][k]
#pragma once
#include "images.h"

template <class T, Memory MEMORY> struct Patches {
    Images<T, MEMORY> from;
    Axis h, w;

    static constexpr bool COLUMNS = MEMORY == Memory::COLUMNS;
    int64_t places() const { return from.images * h.places * w.places; }
    int64_t order() const { return COLUMNS ? from.channels : 1; }  // of the k: (c / order, tap, c % order)
    bool is_matrix() const {  // one tap, which meets pixel j at place j
        auto same = [](const Axis& a) { return a.taps() == 1 && a.at[0] == 0 && a.step == 1 && a.places == a.size; };
        return same(h) && same(w);
    }

    // Places [j0, j0 + count) and taps [k0, k0 + kc), as a Block whose rows are the places.
    template <class E> Block<E> read(int64_t j0, int count, int64_t k0, int kc) const {
        if (std::is_same_v<E, T> && is_matrix()) {
            int64_t area = h.size * w.size, n = COLUMNS ? 0 : j0 / area;
            const T* start = from.p + n * from.image() + (j0 - n * area) * from.pixel() + k0 * from.channel();
            if (COLUMNS || j0 + count <= (n + 1) * area) return {reinterpret_cast<const E*>(start), from.pixel(), from.channel()};
        }
        int64_t ld = round_up(COLUMNS ? kc : count, VL<E>) + VL<E>;
        E* out = scratch<E, READ>((COLUMNS ? count : kc) * ld);
        for (int done = 0, run; done < count; done += run) {
            int64_t j = j0 + done, l = j % w.places, i = j / w.places % h.places;
            const T* image_of_run = from.p + j / (w.places * h.places) * from.image();
            run = int(std::min<int64_t>(count - done, w.places - l));
            if constexpr (COLUMNS) {
                for (int r = 0; r < run; r++) gather_taps(image_of_run, i, l + r, k0, kc, out + (done + r) * ld);
            } else {
                gather_places(image_of_run, i, l, run, k0, kc, out + done, ld);
            }
        }
        return COLUMNS ? Block<E>{out, ld, 1} : Block<E>{out, 1, ld};
    }
    // The same with the taps as rows: what the gradient of the filter sums over are the places.
    template <class E> Block<E> read_transposed(int64_t k0, int kc, int64_t j0, int count) const {
        Block<E> b = read<E>(j0, count, k0, kc);
        return {b.p, b.ks, b.rs};
    }

  private:
    // Places [l, l + run) of row i for every tap: out[k][place]. What is written past the run belongs to the next one.
    template <class E> void gather_places(const T* image, int64_t i, int64_t l, int run, int64_t k0, int kc, E* out, int64_t ld) const {
        int64_t u = k0 % w.taps(), t = k0 / w.taps() % h.taps(), c = k0 / w.taps() / h.taps();
        for (int k = 0; k < kc; k++, out += ld) {
            int64_t row = i * h.step + h.at[t], begin = std::clamp<int64_t>(w.first[u] - l, 0, run);
            int64_t end = std::clamp<int64_t>(w.last[u] - l, begin, run);
            if (row < 0 || row >= h.size) begin = end = 0;
            if (begin > 0) clear(out, begin);
            const T* met = image + c * from.channel() + row * w.size + (l + begin) * w.step + w.at[u];
            if (end > begin) copy_every(w.step, out + begin, met, end - begin);
            if (end < run) clear(out + end, run - end);
            if (++u == w.taps()) u = 0, ++t == h.taps() ? (t = 0, c++) : 0;
        }
    }

    // Taps [k0, k0 + kc) at one place: out[k], tap by tap a run of channels.
    template <class E> void gather_taps(const T* image, int64_t i, int64_t l, int64_t k0, int kc, E* out) const {
        for (int64_t k = k0, n; k < k0 + kc; k += n, out += n) {
            int64_t c = k % from.channels, u = k / from.channels % w.taps(), t = k / from.channels / w.taps();
            int64_t row = i * h.step + h.at[t], column = l * w.step + w.at[u];
            n = std::min(from.channels - c, k0 + kc - k);
            if (row < 0 || row >= h.size || column < 0 || column >= w.size) clear(out, n);
            else copy(out, image + (row * w.size + column) * from.all_channels + c, n);
        }
    }
};

// Every filter of a bank, at every place, for every group: weight * patches.
template <class T, Memory MEMORY>
void multiply_patches(int64_t groups, const Filters<T>& filters, const Images<T, MEMORY>& images, const Bank<T, MEMORY>& bank) {
    using E = element_of<T>;
    int64_t M = filters.M, C = images.channels, K = C * int64_t(bank.taps.size());
    Tensor memory = empty(scalar_type<T>(), {groups * M, K});
    each_group(groups, [&](int64_t g, int64_t threads) {
        Patches<T, MEMORY> patches{images.group(g), bank.h, bank.w};
        Result<T, MEMORY> result = bank.result.of_group(g, M);
        Matrix<T> weight = filters.arranged(g, C, bank.taps, patches.order(), data<T>(memory) + g * M * K);
        auto A = [&](int64_t r0, int rows, int64_t k0, int kc) { return read<E>(weight, r0, rows, k0, kc); };
        auto B = [&](int64_t r0, int rows, int64_t k0, int kc) { return patches.template read<E>(r0, rows, k0, kc); };
        auto write = [&](const auto& t) { result.write(t, result.place(t.n)); };
        multiply<T>(M, patches.places(), K, A, B, static_cast<void*>(nullptr), write, threads);
    });
}
