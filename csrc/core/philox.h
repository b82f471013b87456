// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC'11): four random words from a key and a counter,
// with no state. The same words on every device, and in any order: a draw depends on what it is for, never on who makes it.
#pragma once
#include "core/common.h"

namespace prefkern {

struct PhiloxWords {
  uint32_t word[4];
};

inline namespace PK_ISA {

PK_HD PhiloxWords philox(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ key0, n2 = uint32_t(a >> 32) ^ c3 ^ key1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The key of a 64-bit seed.
PK_HD PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  return philox(uint32_t(seed), uint32_t(seed >> 32), c0, c1, c2, c3);
}

}  // namespace PK_ISA
}  // namespace prefkern
