// F: 16 floats in one AVX-512 register.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define GV_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kMaxRuns = 16;                  // runs that the first Hadamard pass holds in registers
constexpr int kTileRows = 8, kTileRuns = 2;  // covariance tile

// Doubles of one register (the compiler's vector extension), and the tile of a Gram matrix: rows, and registers of
// columns.
typedef double Doubles __attribute__((vector_size(64)));
constexpr int kDoubles = 8, kGramRows = 8, kGramParts = 2;

struct F {
  __m512 v;
};
struct Bf16 {
  uint16_t bits;
};

GV_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
GV_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
GV_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
GV_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
// a - b. The product with 1 is exact: a subtraction on the multiply pipes, which leaves the add pipes to the sums.
GV_INLINE F difference(F a, F b) { return {_mm512_fmsub_ps(a.v, _mm512_set1_ps(1.0f), b.v)}; }
// a > b ? a : b, so that a NaN in b stays.
GV_INLINE F larger(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
GV_INLINE F all(float x) { return {_mm512_set1_ps(x)}; }
GV_INLINE F zero() { return {_mm512_setzero_ps()}; }

GV_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
GV_INLINE F widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
GV_INLINE F load(const float* p) {
  __m512 x = _mm512_loadu_ps(p);
  // Kept in a register: as a memory operand of several instructions it would be loaded once for each.
  asm("" : "+v"(x));
  return {x};
}
GV_INLINE F load(const Bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
// Lanes whose mask bit is clear are zero and their memory is not touched.
GV_INLINE F load_masked(const float* p, unsigned mask) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p)};
}
GV_INLINE F load_masked(const Bf16* p, unsigned mask) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
}
GV_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
GV_INLINE void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
// Round to nearest even; NaN payloads here never reach the low half, so they cannot carry over.
GV_INLINE __m256i narrow(F x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
GV_INLINE void store(Bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
GV_INLINE void store_first(Bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x)); }
GV_INLINE F select_first(F x, int n, F rest) { return {_mm512_mask_mov_ps(rest.v, first_lanes(n), x.v)}; }

// 2^(n - 127) where the low bits of x hold n.
GV_INLINE F power_of_two(F x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))}; }
GV_INLINE F absolute(F x) { return {_mm512_abs_ps(x.v)}; }
GV_INLINE F with_sign_of(F x, F s) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(s.v), _mm512_set1_epi32(INT32_MIN));
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x.v), sign))};
}

// Lane l of the result is +-x[lanes[l] & 15], negative where bit 31 of lanes[l] is set.
GV_INLINE F flip(__m512i x, __m512i lanes) {
  // x ^ (lanes & sign bit)
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, lanes, _mm512_set1_epi32(INT32_MIN), 0x78))};
}
GV_INLINE F permute(F x, const uint32_t* lanes) {
  const __m512i index = _mm512_loadu_si512(lanes);
  return flip(_mm512_castps_si512(_mm512_permutexvar_ps(index, x.v)), index);
}
GV_INLINE F load_permuted(const float* p, unsigned mask, const uint32_t* lanes) {
  return permute(load_masked(p, mask), lanes);
}
// Words move straight into the upper halves of the floats.
GV_INLINE F load_permuted(const Bf16* p, unsigned mask, const uint32_t* lanes) {
  const __m512i index = _mm512_loadu_si512(lanes);
  const __m512i x = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
  return flip(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, index, x), index);
}

// Walsh-Hadamard transform of the 16 lanes of every v. The product with +-1 is exact, so this rounds as add and
// subtract do. Stage by stage over all v: one v at a time is a chain that no scheduler can fill.
template <int R>
GV_INLINE void transform_lanes(F (&v)[R]) {
  const __m512 s1 = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  const __m512 s2 = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
  const __m512 s4 = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
  const __m512 s8 = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) v[r].v = _mm512_fmadd_ps(v[r].v, s1, _mm512_permute_ps(v[r].v, 0xB1));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) v[r].v = _mm512_fmadd_ps(v[r].v, s2, _mm512_permute_ps(v[r].v, 0x4E));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) v[r].v = _mm512_fmadd_ps(v[r].v, s4, _mm512_shuffle_f32x4(v[r].v, v[r].v, 0xB1));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) v[r].v = _mm512_fmadd_ps(v[r].v, s8, _mm512_shuffle_f32x4(v[r].v, v[r].v, 0x4E));
}

// Lanes i and i + 8, then i and i + 4, i + 2, i + 1: one tree on every ISA.
GV_INLINE float sum(F x) {
  const __m256 h8 = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
  const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
  return _mm_cvtss_f32(_mm_add_ss(h2, _mm_shuffle_ps(h2, h2, 1)));
}

}  // namespace
