// Prints, for every "m column seed" among the arguments, the 64 numbers of row m from that column on, and philox itself for counters and
// keys that no row and column reach: "c0 c1 c2 c3 k0 k1". Numbers are hexadecimal.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "philox.h"

int main(int count, char** arguments) {
    for (int i = 1; i < count; i++) {
        uint64_t v[6];
        int found = 0;
        for (char* word = std::strtok(arguments[i], " "); word; word = std::strtok(nullptr, " ")) v[found++] = std::strtoull(word, nullptr, 16);
        if (found == 3) {
            uint32_t number[PHILOX_BLOCK];
            Philox(v[2]).block(v[0], v[1], number);
            for (uint32_t n : number) std::printf("%08x ", n);
        } else {
            vec<uint64_t> c[4] = {set(v[0]), set(v[1]), set(v[2]), set(v[3])};
            Philox(v[4] | v[5] << 32).rounds(c);
            for (auto word : c) std::printf("%08x ", uint32_t(word[0]));
        }
        std::printf("\n");
    }
}
