// U: 16 words of 32 bits in one AVX-512 register; what the signs of the dense mode are made of and looked up with.
#pragma once

#include "vec_avx512.h"

namespace {

struct U {
  __m512i v;
};

GV_INLINE U all_words(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
// x, x + 1, ..., x + 15.
GV_INLINE U count_from(uint32_t x) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(x)), lanes)};
}
GV_INLINE U load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
GV_INLINE void store_words(uint32_t* p, U x) { _mm512_storeu_si512(p, x.v); }
GV_INLINE U next_index(U x) { return {_mm512_srli_epi32(x.v, 4)}; }

// The 64-bit products of even and odd lanes, sorted into halves by one masked shuffle each.
GV_INLINE void multiply(U x, uint32_t m, U& high, U& low) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x.v, 32), factor);
  high = {_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB)};
  low = {_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB)};
}
GV_INLINE U mix(U x, U y, uint32_t key) {
  return {_mm512_ternarylogic_epi32(x.v, y.v, _mm512_set1_epi32(static_cast<int>(key)), 0x96)};
}

// table[index & 15] in every lane.
GV_INLINE F look_up(const float* table, U index) { return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table))}; }

}  // namespace
