#include "limits.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <set>
#include <stdexcept>

#include "cpu.h"
#include "team.h"

namespace dlkernels::host {
namespace {

// Fresh pages, large ones where the system has them, so that what is measured is the memory and not the page tables.
class Pages {
public:
    explicit Pages(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
        start_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        madvise(start_, bytes_, MADV_HUGEPAGE);
#endif
    }
    ~Pages() { munmap(start_, bytes_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    char* start() const { return static_cast<char*>(start_); }

private:
    std::size_t bytes_;
    void* start_;
};

struct Kind {
    int arrays;                       // that one thread passes over, of one size
    std::vector<MemoryProbe> probes;  // ways to do it; the best one is the limit
};

Kind kind_named(const std::string& name) {
    const MemoryProbes& probes = memory_probes();
    if (name == "read") return {1, {probes.read}};
    if (name == "copy") return {2, {probes.copy, probes.streaming_copy}};
    if (name == "triad") return {3, {probes.triad, probes.streaming_triad}};
    throw std::invalid_argument("kind must be 'read', 'copy' or 'triad', got '" + name + "'");
}

void check_bytes(std::int64_t bytes, std::int64_t least) {
    const std::int64_t most = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 2;
    if (bytes < least || bytes > most) {
        throw std::invalid_argument("bytes must be between " + std::to_string(least) + " (one block for each thread and array) and " +
                                    std::to_string(most) + " (half of the memory), got " + std::to_string(bytes));
    }
}

}  // namespace

double peak_flops(const std::string& dtype, int threads, double seconds) {
    static const std::set<std::string> known = {"float16", "bfloat16", "float32", "float64"};
    if (!known.count(dtype)) throw std::invalid_argument("dtype must be 'float16', 'bfloat16', 'float32' or 'float64', got '" + dtype + "'");
    check_threads(threads);
    check_seconds(seconds);

    const std::vector<FlopsProbe> probes = flops_probes(dtype);
    double best = 0;
    for (const FlopsProbe& probe : probes) {
        best = std::max(best, best_rate(threads, seconds / static_cast<double>(probes.size()), probe.flops * threads,
                                        [&](int, std::int64_t repeats) { probe.run(repeats); }));
    }
    return best;
}

double bandwidth(std::int64_t bytes, int threads, double seconds, const std::string& kind_name) {
    const Kind kind = kind_named(kind_name);
    check_threads(threads);
    check_seconds(seconds);
    check_bytes(bytes, kBlockBytes * kind.arrays * threads);

    const std::int64_t array = bytes / (kBlockBytes * kind.arrays * threads) * kBlockBytes;
    const std::int64_t slice = array * kind.arrays;
    Pages pages(slice * threads);
    const auto touch = [&](int thread) { std::fill_n(reinterpret_cast<float*>(pages.start() + thread * slice), slice / 4, 1.0f); };

    double best = 0;
    for (const MemoryProbe& probe : kind.probes) {
        best = std::max(best, best_rate(threads, seconds / static_cast<double>(kind.probes.size()), static_cast<double>(slice * threads),
                                        [&](int thread, std::int64_t passes) { probe(pages.start() + thread * slice, array, passes); }, touch));
    }
    return best;
}

}  // namespace dlkernels::host
