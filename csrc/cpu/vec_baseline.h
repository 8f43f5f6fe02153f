// F: 16 floats in four 128-bit vectors of the compiler's vector extension (SSE2, NEON).
#pragma once

#include <stdint.h>
#include <string.h>

#define GV_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kMaxRuns = 4;                   // runs that the first Hadamard pass works on at once
constexpr int kTileRows = 4, kTileRuns = 1;  // covariance tile

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInt __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));

// Doubles of one register (the compiler's vector extension), and the tile of a Gram matrix: rows, and registers of
// columns.
typedef double Doubles __attribute__((vector_size(16)));
constexpr int kDoubles = 2, kGramRows = 4, kGramParts = 2;

struct F {
  Quad q[4];
};
struct Bf16 {
  uint16_t bits;
};

#ifdef __clang__
#define GV_SHUFFLE(x, a, b, c, d) __builtin_shufflevector(x, x, a, b, c, d)
#else
#define GV_SHUFFLE(x, a, b, c, d) __builtin_shuffle(x, QuadInt{a, b, c, d})
#endif

template <typename Op>
GV_INLINE F each(F a, F b, Op op) {
  return {{op(a.q[0], b.q[0]), op(a.q[1], b.q[1]), op(a.q[2], b.q[2]), op(a.q[3], b.q[3])}};
}
GV_INLINE QuadBits bits_of(Quad x) { return (QuadBits)x; }
GV_INLINE Quad choose(QuadInt mask, Quad yes, Quad no) {
  return (Quad)((bits_of(yes) & (QuadBits)mask) | (bits_of(no) & ~(QuadBits)mask));
}

GV_INLINE F operator+(F a, F b) { return each(a, b, [](Quad x, Quad y) { return x + y; }); }
GV_INLINE F operator-(F a, F b) { return each(a, b, [](Quad x, Quad y) { return x - y; }); }
GV_INLINE F operator*(F a, F b) { return each(a, b, [](Quad x, Quad y) { return x * y; }); }
GV_INLINE F operator/(F a, F b) { return each(a, b, [](Quad x, Quad y) { return x / y; }); }
GV_INLINE F difference(F a, F b) { return a - b; }
// a > b ? a : b, so that a NaN in b stays.
GV_INLINE F larger(F a, F b) { return each(a, b, [](Quad x, Quad y) { return choose(x > y, x, y); }); }
GV_INLINE F all(float x) {
  const Quad q = {x, x, x, x};
  return {{q, q, q, q}};
}
GV_INLINE F zero() { return all(0.0f); }

GV_INLINE F load(const float* p) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
GV_INLINE F load(const Bf16* p) {
  F x;
  for (int i = 0; i < 4; ++i) {
    const QuadBits bits = {p[4 * i].bits, p[4 * i + 1].bits, p[4 * i + 2].bits, p[4 * i + 3].bits};
    x.q[i] = (Quad)(bits << 16);
  }
  return x;
}
GV_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
// Round to nearest even; NaN payloads here never reach the low half, so they cannot carry over.
GV_INLINE void store(Bf16* p, F x) {
  for (int i = 0; i < 4; ++i) {
    const QuadBits bits = bits_of(x.q[i]);
    const QuadBits up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    for (int j = 0; j < 4; ++j) p[4 * i + j].bits = (uint16_t)up[j];
  }
}
// Lanes whose mask bit is clear are zero and their memory is not touched; masks are runs of low bits.
template <typename T>
GV_INLINE F load_masked(const T* p, unsigned mask) {
  if (mask == 0xffffu) return load(p);
  T held[16];
  memset(held, 0, sizeof held);
  memcpy(held, p, sizeof(T) * (unsigned)__builtin_popcount(mask));
  return load(held);
}
template <typename T>
GV_INLINE void store_first(T* p, F x, int n) {
  T held[16];
  store(held, x);
  memcpy(p, held, sizeof(T) * (unsigned)n);
}
GV_INLINE F select_first(F x, int n, F rest) {
  const QuadInt lanes = {0, 1, 2, 3};
  for (int i = 0; i < 4; ++i) x.q[i] = choose(lanes + 4 * i < n, x.q[i], rest.q[i]);
  return x;
}

// 2^(n - 127) where the low bits of x hold n.
GV_INLINE F power_of_two(F x) {
  return each(x, x, [](Quad a, Quad) { return (Quad)(bits_of(a) << 23); });
}
GV_INLINE F absolute(F x) {
  return each(x, x, [](Quad a, Quad) { return (Quad)(bits_of(a) & 0x7fffffffu); });
}
GV_INLINE F with_sign_of(F x, F s) {
  return each(x, s, [](Quad a, Quad b) { return (Quad)(bits_of(a) | (bits_of(b) & 0x80000000u)); });
}

// Lane l of the result is +-x[lanes[l] & 15], negative where bit 31 of lanes[l] is set.
GV_INLINE F permute(F x, const uint32_t* lanes) {
  uint32_t from[16], to[16];
  memcpy(from, &x, sizeof from);
  for (int l = 0; l < 16; ++l) to[l] = from[lanes[l] & 15] ^ (lanes[l] & 0x80000000u);
  memcpy(&x, to, sizeof to);
  return x;
}

template <typename T>
GV_INLINE F load_permuted(const T* p, unsigned mask, const uint32_t* lanes) {
  return permute(load_masked(p, mask), lanes);
}

GV_INLINE Quad transform_quad(Quad v) {
  const QuadBits s1 = {0, 0x80000000u, 0, 0x80000000u}, s2 = {0, 0, 0x80000000u, 0x80000000u};
  v = GV_SHUFFLE(v, 1, 0, 3, 2) + (Quad)(bits_of(v) ^ s1);
  return GV_SHUFFLE(v, 2, 3, 0, 1) + (Quad)(bits_of(v) ^ s2);
}
// Walsh-Hadamard transform of the 16 lanes of every v.
template <int R>
GV_INLINE void transform_lanes(F (&v)[R]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Quad a = transform_quad(v[r].q[0]), b = transform_quad(v[r].q[1]);
    const Quad c = transform_quad(v[r].q[2]), d = transform_quad(v[r].q[3]);
    const Quad ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
    v[r] = {{ab + cd, a_b + c_d, ab - cd, a_b - c_d}};
  }
}

// Lanes i and i + 8, then i and i + 4, i + 2, i + 1: one tree on every ISA.
GV_INLINE float sum(F x) {
  const Quad h4 = (x.q[0] + x.q[2]) + (x.q[1] + x.q[3]);
  return (h4[0] + h4[2]) + (h4[1] + h4[3]);
}

}  // namespace
