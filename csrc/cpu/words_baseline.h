// U: 16 words of 32 bits; what the signs of the dense mode are made of and looked up with.
#pragma once

#include "vec_baseline.h"

namespace {

struct U {
  uint32_t w[16];
};

GV_INLINE U all_words(uint32_t x) {
  U y;
  for (uint32_t& word : y.w) word = x;
  return y;
}
// x, x + 1, ..., x + 15.
GV_INLINE U count_from(uint32_t x) {
  U y;
  for (uint32_t l = 0; l < 16; ++l) y.w[l] = x + l;
  return y;
}
GV_INLINE U load_words(const uint32_t* p) {
  U x;
  memcpy(&x, p, sizeof x);
  return x;
}
GV_INLINE void store_words(uint32_t* p, U x) { memcpy(p, &x, sizeof x); }
GV_INLINE U next_index(U x) {
  for (uint32_t& word : x.w) word >>= 4;
  return x;
}
GV_INLINE void multiply(const U& x, uint32_t m, U& high, U& low) {
  for (int l = 0; l < 16; ++l) {
    const uint64_t product = static_cast<uint64_t>(x.w[l]) * m;
    high.w[l] = static_cast<uint32_t>(product >> 32);
    low.w[l] = static_cast<uint32_t>(product);
  }
}
GV_INLINE U mix(const U& x, const U& y, uint32_t key) {
  U z;
  for (int l = 0; l < 16; ++l) z.w[l] = x.w[l] ^ y.w[l] ^ key;
  return z;
}

// table[index & 15] in every lane.
GV_INLINE F look_up(const float* table, U index) {
  float held[16];
  for (int l = 0; l < 16; ++l) held[l] = table[index.w[l] & 15];
  return load(held);
}

}  // namespace
