#include "roofline.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
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

// The best of several ways to do a thing: a short trial of each, the rest of the time for the winner.
double best_of(std::size_t ways, double seconds, const std::function<double(std::size_t way, double seconds)>& measure) {
    constexpr double kTrial = 0.1;
    std::size_t winner = 0;
    double best = 0;
    for (std::size_t way = 0; ways > 1 && way < ways; ++way) {
        const double rate = measure(way, kTrial * seconds);
        if (rate > best) winner = way;
        best = std::max(best, rate);
    }
    const double trials = ways > 1 ? kTrial * static_cast<double>(ways) : 0;
    return std::max(best, measure(winner, (1 - trials) * seconds));
}

}  // namespace

double peak_flops(const std::string& dtype, int threads, double seconds) {
    static const std::set<std::string> known = {"float16", "bfloat16", "float32", "float64"};
    if (!known.count(dtype)) {
        throw std::invalid_argument("dtype must be 'float16', 'bfloat16', 'float32' or 'float64', got '" + dtype + "'");
    }
    check_threads(threads);
    check_seconds(seconds);

    const std::vector<FlopsProbe> probes = flops_probes(dtype);
    return best_of(probes.size(), seconds, [&](std::size_t way, double share) {
        const FlopsProbe& probe = probes[way];
        return best_rate(threads, share, probe.flops * threads, [&](int, std::int64_t repeats) { probe.run(repeats); });
    });
}

double bandwidth(std::int64_t bytes, int threads, double seconds, const std::string& kind_name) {
    const Kind kind = kind_named(kind_name);
    check_threads(threads);
    check_seconds(seconds);
    check_bytes(bytes, kBlockBytes * kind.arrays * threads);

    const std::int64_t array = bytes / (kBlockBytes * kind.arrays * threads) * kBlockBytes;
    const std::int64_t slice = array * kind.arrays;
    const Pages pages(slice * threads);
    const auto slice_of = [&](int thread) { return pages.start() + thread * slice; };
    // The first to write a page decides which socket's memory it lies in.
    run_team(threads, [&](int thread) { std::fill_n(reinterpret_cast<float*>(slice_of(thread)), slice / 4, 1.0f); });

    return best_of(kind.probes.size(), seconds, [&](std::size_t way, double share) {
        const MemoryProbe probe = kind.probes[way];
        return best_rate(threads, share, static_cast<double>(slice * threads),
                         [&](int thread, std::int64_t passes) { probe(slice_of(thread), array, passes); });
    });
}

}  // namespace dlkernels::host
