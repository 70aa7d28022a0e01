#include "team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu.h"

namespace dlkernels::host {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kWindow = 250e-6;  // seconds: long against a barrier, short against the turns that other programs take
constexpr int kLeastWindows = 10;   // where the time brings fewer, because other programs took it,
constexpr double kGrace = 0.03;     // it is extended by up to so many seconds
constexpr int kMaxThreads = 1024;
constexpr double kMaxSeconds = 60;

double seconds_between(Clock::time_point start, Clock::time_point end) { return std::chrono::duration<double>(end - start).count(); }

class SpinBarrier {
public:
    SpinBarrier(int threads, int spins) : threads_(threads), spins_(spins) {}

    void wait() {
        const int round = round_.load();
        if (waiting_.fetch_add(1) + 1 == threads_) {
            waiting_ = 0;
            ++round_;
            return;
        }
        for (int spin = 0; round_.load() == round; ++spin) {
            if (spin > spins_) std::this_thread::yield();
        }
    }

private:
    const int threads_, spins_;
    std::atomic<int> waiting_{0}, round_{0};
};

// With a core of its own a waiting thread spins, so that the core is still its own when the last one arrives. Without, it makes room.
int spins_before_yielding(int threads) { return static_cast<std::size_t>(threads) <= cpus_by_core().size() ? 10'000'000 : 100; }

}  // namespace

void run_team(int threads, const std::function<void(int)>& body) {
    enum Gate { kClosed, kOpen, kCancelled };
    std::atomic<int> gate{kClosed};
    const std::vector<int> cpus = cpus_by_core();
    const bool pinned = static_cast<std::size_t>(threads) <= cpus.size();  // a busy system would run unpinned threads by turns on one core
    std::vector<std::thread> team;
    team.reserve(static_cast<std::size_t>(threads));
    int opened = kOpen;
    try {
        for (int thread = 0; thread < threads; ++thread) {
            team.emplace_back([&, thread] {
                if (pinned) pin_this_thread(cpus[static_cast<std::size_t>(thread)]);
                while (gate == kClosed) std::this_thread::yield();
                if (gate == kOpen) body(thread);
            });
        }
    } catch (const std::system_error&) {
        opened = kCancelled;
    }
    gate = opened;
    for (std::thread& member : team) member.join();
    if (opened == kCancelled) {
        throw std::runtime_error("threads: the system refused to start " + std::to_string(threads) + " threads (it started " +
                                 std::to_string(team.size()) + ")");
    }
}

double best_rate(int threads, double seconds, double amount, const std::function<void(int, std::int64_t)>& work) {
    SpinBarrier barrier(threads, spins_before_yielding(threads));
    std::vector<Clock::time_point> started(static_cast<std::size_t>(threads)), ended(started);
    std::int64_t repeats = 1;
    int windows = 0;
    double best = 0;
    bool done = false;  // like repeats, windows and best, written by thread 0 while the others wait at the top of the loop
    const Clock::time_point begin = Clock::now();

    run_team(threads, [&](int thread) {
        const auto self = static_cast<std::size_t>(thread);
        for (;;) {
            barrier.wait();
            if (done) return;
            started[self] = Clock::now();
            work(thread, repeats);
            ended[self] = Clock::now();
            barrier.wait();
            if (thread != 0) continue;
            const double window =
                seconds_between(*std::min_element(started.begin(), started.end()), *std::max_element(ended.begin(), ended.end()));
            if (window < kWindow) {
                repeats *= 2;  // still finding the number of repeats that fills a window
            } else {
                best = std::max(best, amount * static_cast<double>(repeats) / window);
                ++windows;
                const double left = seconds - seconds_between(begin, Clock::now());
                done = left < 0 && (windows >= kLeastWindows || left < -kGrace);
            }
        }
    });
    return best;
}

void check_threads(int threads) {
    if (threads < 1 || threads > kMaxThreads) {
        throw std::invalid_argument("threads must be between 1 and " + std::to_string(kMaxThreads) + ", got " + std::to_string(threads));
    }
}

void check_seconds(double seconds) {
    if (!(seconds > 0 && seconds <= kMaxSeconds)) {  // false for NaN too
        throw std::invalid_argument("seconds must be above 0 and at most 60, got " + std::to_string(seconds));
    }
}

}  // namespace dlkernels::host
