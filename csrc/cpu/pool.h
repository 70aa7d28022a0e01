// Memory of large results, kept for the next one of about that size.
//
// A large block that malloc gives back goes to the system, and the next one comes as pages that the system zeroes when they are first
// written: more work than most kernels do. Training asks for the same sizes step after step, so what one step lets go serves the next.
//
//   take(bytes)  the block of this size class that was given back last, its pages most likely still in a cache; else one from the system
//   give(block)  kept, and the blocks that have waited longest go to the system as long as more than the limit is kept
//
// The limit is an eighth of the machine's memory, or DLKERNELS_POOL_MIB; 0 keeps nothing. Nothing waits for a lock: who finds the pool in
// use goes to the system, and so does a process forked at that moment.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

class Pool {
   public:
    static constexpr size_t SMALLEST = 4 << 20;  // malloc keeps smaller blocks itself

    static Pool& shared() {
        static Pool& pool = *new Pool;  // never destroyed: tensors may outlive every static object
        return pool;
    }

    // Null where the system has no more memory.
    void* take(size_t bytes) {
        bytes = size_class(bytes);
        if (std::unique_lock lock(mutex, std::try_to_lock); lock)
            for (size_t i = blocks.size(); i-- > 0;)
                if (blocks[i].bytes == bytes) {
                    void* start = blocks[i].start;
                    blocks.erase(blocks.begin() + i), kept -= bytes;
                    return start;
                }
        void* start = from_system(bytes);
        return start || !release() ? start : from_system(bytes);
    }

    void give(void* start, size_t bytes) {
        bytes = size_class(bytes);
        std::unique_lock lock(mutex, std::try_to_lock);
        if (!lock || bytes > limit) return to_system({start, bytes});
        blocks.push_back({start, bytes}), kept += bytes;
        size_t gone = 0;
        for (; kept > limit; gone++) kept -= blocks[gone].bytes, to_system(blocks[gone]);
        blocks.erase(blocks.begin(), blocks.begin() + gone);
    }

    // Everything that is kept goes to the system. Returns how many bytes that was.
    size_t release() {
        std::unique_lock lock(mutex, std::try_to_lock);
        if (!lock) return 0;
        for (const Block& block : blocks) to_system(block);
        blocks.clear();
        return std::exchange(kept, 0);
    }

   private:
    struct Block {
        void* start;
        size_t bytes;
    };
    std::mutex mutex;
    std::vector<Block> blocks;  // the one that has waited longest first
    size_t kept = 0, limit = memory_limit();

    // The next of 8 steps between a power of two and the next: sizes that differ a little share blocks, for an eighth of them at most.
    static size_t size_class(size_t bytes) {
        size_t step = SMALLEST / 8;
        while (step * 16 <= bytes) step *= 2;
        return (bytes + step - 1) / step * step;
    }

    static size_t memory_limit() {
        if (const char* mib = std::getenv("DLKERNELS_POOL_MIB")) return size_t(std::max(0L, std::atol(mib))) << 20;
        return size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 8;
    }

    static void* from_system(size_t bytes) {
        void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
        madvise(start, bytes, MADV_HUGEPAGE);  // one fault for 2 MiB
#endif
        return start;
    }
    static void to_system(const Block& block) { munmap(block.start, block.bytes); }
};
