// U: 16 words of 32 bits in two AVX2 registers; what the signs of the dense mode are made of and looked up with.
#pragma once

#include "vec_avx2.h"

namespace {

struct U {
  __m256i lo, hi;
};

GV_INLINE U all_words(uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x)), _mm256_set1_epi32(static_cast<int>(x))};
}
// x, x + 1, ..., x + 15.
GV_INLINE U count_from(uint32_t x) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(x)), lanes),
          _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(x + 8)), lanes)};
}
GV_INLINE U load_words(const uint32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
GV_INLINE void store_words(uint32_t* p, U x) {
  __m256i* q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.lo);
  _mm256_storeu_si256(q + 1, x.hi);
}
GV_INLINE U next_index(U x) { return {_mm256_srli_epi32(x.lo, 4), _mm256_srli_epi32(x.hi, 4)}; }

GV_INLINE void multiply_half(__m256i x, __m256i factor, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
GV_INLINE void multiply(U x, uint32_t m, U& high, U& low) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  multiply_half(x.lo, factor, high.lo, low.lo);
  multiply_half(x.hi, factor, high.hi, low.hi);
}
GV_INLINE U mix(U x, U y, uint32_t key) {
  const __m256i k = _mm256_set1_epi32(static_cast<int>(key));
  return {_mm256_xor_si256(_mm256_xor_si256(x.lo, y.lo), k), _mm256_xor_si256(_mm256_xor_si256(x.hi, y.hi), k)};
}

// Bit 3 of the index chooses the half of the table; the blend looks at the sign bit.
GV_INLINE __m256 look_up_half(__m256 low, __m256 high, __m256i index) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                          _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
// table[index & 15] in every lane.
GV_INLINE F look_up(const float* table, U index) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  return {look_up_half(low, high, index.lo), look_up_half(low, high, index.hi)};
}

}  // namespace
