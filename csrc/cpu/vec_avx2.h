// F: 16 floats in two AVX2 registers.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define GV_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kMaxRuns = 4;                   // runs that the first Hadamard pass holds in registers
constexpr int kTileRows = 4, kTileRuns = 1;  // covariance tile

// Doubles of one register (the compiler's vector extension), and the tile of a Gram matrix: rows, and registers of
// columns.
typedef double Doubles __attribute__((vector_size(32)));
constexpr int kDoubles = 4, kGramRows = 4, kGramParts = 2;

struct F {
  __m256 lo, hi;
};
struct Bf16 {
  uint16_t bits;
};

GV_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
GV_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
GV_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
GV_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
GV_INLINE F difference(F a, F b) { return a - b; }
// a > b ? a : b, so that a NaN in b stays.
GV_INLINE F larger(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
GV_INLINE F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
GV_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

GV_INLINE __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
GV_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
GV_INLINE F load(const Bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
}
GV_INLINE void store(float* p, F x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
// Round to nearest even; NaN payloads here never reach the low half, so they cannot carry over.
GV_INLINE __m256i round_up(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
GV_INLINE void store(Bf16* p, F x) {
  const __m256i packed = _mm256_packus_epi32(round_up(x.lo), round_up(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
// Lanes whose mask bit is clear are zero and their memory is not touched; masks are runs of low bits.
template <typename T>
GV_INLINE F load_masked(const T* p, unsigned mask) {
  if (mask == 0xffffu) return load(p);
  T held[16];
  memset(held, 0, sizeof held);
  memcpy(held, p, sizeof(T) * static_cast<unsigned>(__builtin_popcount(mask)));
  return load(held);
}
template <typename T>
GV_INLINE void store_first(T* p, F x, int n) {
  T held[16];
  store(held, x);
  memcpy(p, held, sizeof(T) * static_cast<unsigned>(n));
}
GV_INLINE F select_first(F x, int n, F rest) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
  const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes);
  return {_mm256_blendv_ps(rest.lo, x.lo, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(rest.hi, x.hi, _mm256_castsi256_ps(high))};
}

// 2^(n - 127) where the low bits of x hold n.
GV_INLINE F power_of_two(F x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.hi), 23))};
}
GV_INLINE F absolute(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.lo), _mm256_andnot_ps(sign, x.hi)};
}
GV_INLINE F with_sign_of(F x, F s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(x.lo, _mm256_and_ps(s.lo, sign)), _mm256_or_ps(x.hi, _mm256_and_ps(s.hi, sign))};
}

GV_INLINE __m256 permute_half(F x, const uint32_t* lanes) {
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  const __m256 from_lo = _mm256_permutevar8x32_ps(x.lo, index), from_hi = _mm256_permutevar8x32_ps(x.hi, index);
  // Bit 3 of the lane chooses the half; the blend looks at the sign bit.
  const __m256 moved = _mm256_blendv_ps(from_lo, from_hi, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  return _mm256_xor_ps(moved, _mm256_and_ps(_mm256_castsi256_ps(index), _mm256_set1_ps(-0.0f)));
}
// Lane l of the result is +-x[lanes[l] & 15], negative where bit 31 of lanes[l] is set.
GV_INLINE F permute(F x, const uint32_t* lanes) { return {permute_half(x, lanes), permute_half(x, lanes + 8)}; }
template <typename T>
GV_INLINE F load_permuted(const T* p, unsigned mask, const uint32_t* lanes) {
  return permute(load_masked(p, mask), lanes);
}

GV_INLINE __m256 transform_half(__m256 v) {
  const __m256 s1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
  const __m256 s2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
  const __m256 s4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
  v = _mm256_add_ps(_mm256_permute_ps(v, 0xB1), _mm256_xor_ps(v, s1));
  v = _mm256_add_ps(_mm256_permute_ps(v, 0x4E), _mm256_xor_ps(v, s2));
  return _mm256_add_ps(_mm256_permute2f128_ps(v, v, 0x01), _mm256_xor_ps(v, s4));
}
// Walsh-Hadamard transform of the 16 lanes of every v.
template <int R>
GV_INLINE void transform_lanes(F (&v)[R]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m256 lo = transform_half(v[r].lo), hi = transform_half(v[r].hi);
    v[r] = {_mm256_add_ps(lo, hi), _mm256_sub_ps(lo, hi)};
  }
}

// Lanes i and i + 8, then i and i + 4, i + 2, i + 1: one tree on every ISA.
GV_INLINE float sum(F x) {
  const __m256 h8 = _mm256_add_ps(x.lo, x.hi);
  const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
  const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
  return _mm_cvtss_f32(_mm_add_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
}

}  // namespace
