// Work on the numbers of many tensors at once, as an optimizer does: one parallel region whether they are ten thousand small ones or one large.
//
//   Entry        what belongs to one parameter: up to ARRAYS arrays with their numbers in the same order
//   each_part    the numbers of all entries are cut into units, and every thread gets as many units as any other: body(entry, begin, end)
//
// Where the arrays of an entry lie densely in the same order, any order, they are used as they are. Else work is done on contiguous copies,
// which write_back puts where they belong.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "op.h"
#include "rows.h"

constexpr int ARRAYS = 5;
using Tensors = std::vector<Tensor>;

struct NamedList {
    const char* name;
    const Tensors& tensors;  // one per parameter, or none at all
    bool is_kept = false;    // of the first list's type, or float beside a half type, or bf16 where the op keeps everything so
    bool written = true;     // a copy of one that is only read need not go back
};

struct Entry {
    void* array[ARRAYS];  // null where its list is empty
    int64_t size;
    ScalarType type, kept;  // of the first array, and of those that are kept
};

struct Entries {
    std::vector<Entry> all;
    struct Copy { Tensor original, copy; bool written; };
    std::vector<Copy> copies;
    const bool bf16_kept;

    // Every tensor is checked before any is touched. The first list says how many there are and of which shape and dtype.
    Entries(const char* op, std::initializer_list<NamedList> lists, bool bf16_kept = false)
        : all(lists.begin()->tensors.size()), bf16_kept(bf16_kept) {
        for (const auto& [name, tensors, is_kept, written] : lists)
            if (!tensors.empty() && tensors.size() != all.size())
                fail(op, ": ", name, " has ", tensors.size(), " tensors, needs ", all.size(), " like ", lists.begin()->name);
        std::vector<char> done(all.size());  // to look at thousands of tensors is to wait for memory: threads wait side by side
        parallel(all.size(), [&](int64_t i, int64_t end) { for (; i < end; i++) done[i] = place_simple(lists, i); }, all.size() < 64);
        for (size_t i = 0; i < all.size(); i++)
            if (!done[i]) check(op, lists, i);
        for (size_t i = 0; i < all.size(); i++)
            if (!done[i]) place(lists, i);
    }
    void write_back() const {
        for (const Copy& c : copies)
            if (Tensor to = c.original; c.written) torch::stable::copy_(to, c.copy);
    }

   private:
    // False where the entry is not of contiguous float tensors of one dtype and shape, and needs a closer look.
    bool place_simple(std::initializer_list<NamedList> lists, size_t i) {
        const Tensor& first = lists.begin()->tensors[i];
        if (!first.defined()) return false;
        const auto sizes = first.sizes();
        const ScalarType dtype = first.scalar_type();
        if (dtype != ScalarType::Float && (dtype != ScalarType::Double || bf16_kept) && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
            return false;
        all[i] = {{}, first.numel(), dtype, bf16_kept ? ScalarType::BFloat16 : dtype};
        int a = 0;
        for (const auto& list : lists) {
            void*& array = all[i].array[a++];
            if (list.tensors.empty()) continue;
            const Tensor& t = list.tensors[i];
            if (!t.defined() || !t.is_cpu() || t.layout() != torch::headeronly::Layout::Strided ||
                t.scalar_type() != (list.is_kept ? all[i].kept : dtype) || !std::ranges::equal(t.sizes(), sizes) || !t.is_contiguous())
                return false;
            array = t.data_ptr();
        }
        return true;
    }
    void check(const char* op, std::initializer_list<NamedList> lists, size_t i) {
        const Tensor& first = lists.begin()->tensors[i];
        ScalarType& kept = all[i].kept;
        all[i] = {{}, first.defined() ? first.numel() : 0, first.scalar_type(), bf16_kept ? ScalarType::BFloat16 : first.scalar_type()};
        with_type(op, all[i].type, [](auto) {});
        if (bf16_kept && all[i].type == ScalarType::Double)
            fail(op, ": ", lists.begin()->name, " has dtype Double, beside which nothing is kept in BFloat16; tensor number ", i);
        for (const auto& [name, tensors, is_kept, written] : lists) {
            if (tensors.empty()) continue;
            if (is_kept && !bf16_kept && first.element_size() == 2 && tensors[i].scalar_type() == ScalarType::Float) kept = ScalarType::Float;
            try {
                checked(op, name, tensors[i], is_kept ? kept : all[i].type, first.sizes().data(), first.sizes().size());
            } catch (const std::exception& error) {
                fail(error.what(), "; tensor number ", i);
            }
        }
    }
    void place(std::initializer_list<NamedList> lists, size_t i) {
        const Tensor& first = lists.begin()->tensors[i];
        bool as_it_is = first.is_contiguous() || is_dense(first);
        for (const auto& list : lists)
            if (!list.tensors.empty()) as_it_is &= std::ranges::equal(list.tensors[i].strides(), first.strides());
        int a = 0;
        for (const auto& list : lists) {
            void*& array = all[i].array[a++];
            if (list.tensors.empty()) continue;
            const Tensor& t = list.tensors[i];
            if (as_it_is || t.is_contiguous()) array = t.data_ptr();
            else copies.push_back({t, contiguous_copy(t), list.written}), array = copies.back().copy.data_ptr();
        }
    }
    // Whether the numbers fill a stretch of memory, in any order.
    static bool is_dense(const Tensor& t) {
        std::vector<int> order(t.dim());
        std::iota(order.begin(), order.end(), 0);
        std::ranges::sort(order, {}, [&](int d) { return t.stride(d); });
        int64_t next = 1;
        for (int d : order) {
            if (t.size(d) != 1 && t.stride(d) != next) return false;
            next *= t.size(d);
        }
        return true;
    }
};

constexpr int64_t UNIT = 1 << 11;

// The number of every entry's first unit, and of all.
inline std::vector<int64_t> first_units(const std::vector<Entry>& entries) {
    std::vector<int64_t> first(entries.size() + 1, 0);
    for (size_t i = 0; i < entries.size(); i++) first[i + 1] = first[i] + (entries[i].size + UNIT - 1) / UNIT;
    return first;
}

template <class Body> void each_part(const std::vector<Entry>& entries, const Body& body) {
    const std::vector<int64_t> first = first_units(entries);
    parallel(first.back(), [&](int64_t unit, int64_t end) {
        for (size_t i = std::ranges::upper_bound(first, unit) - first.begin() - 1; unit < end; i++) {
            int64_t stop = std::min(end, first[i + 1]);
            if (unit < stop) body(i, (unit - first[i]) * UNIT, std::min(entries[i].size, (stop - first[i]) * UNIT));
            unit = stop;
        }
    }, first.back() * UNIT <= SERIAL_NUMBERS);
}

// f(T, S) with the types of the entry's numbers: its first array's, and that of those that are kept, unless these are bf16 by `bf16_kept`.
template <class F> void with_types(const char* op, const Entry& entry, const F& f) {
    with_type(op, entry.type, [&](auto type) {
        if constexpr (sizeof(type) == 2)
            if (entry.kept == ScalarType::Float) return f(type, float{});
        f(type, type);
    });
}

// A single number, or `otherwise` where there is no tensor.
inline double number_of(const char* op, const char* name, const std::optional<Tensor>& t, double otherwise) {
    if (!t) return otherwise;
    ScalarType dtype = t->defined() && t->scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    checked(op, name, *t, dtype, t->sizes().data(), t->sizes().size());
    if (t->numel() != 1) fail(op, ": ", name, " has shape ", shape_text(*t), ", needs a single number");
    return dtype == ScalarType::Double ? *static_cast<const double*>(t->data_ptr()) : *static_cast<const float*>(t->data_ptr());
}
