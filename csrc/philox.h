// The signs of the dense mode, z = K^-1/2 Pi^T g with Pi in {+-1}^{P x K}, from Philox4x32-10 (Salmon et al., SC 2011):
//   Pi[j][c] = -1 where bit j % 32 of word (j % 128) / 32 of philox(counter(j / 128, c), key) is set, else +1;
//   counter(block, c) = (block mod 2^32, block / 2^32, c, 0); key = two words from the seed and the parameter's name.
// gvendi_fast/kernels/signs.py is the same definition in NumPy. K is not in it: a sketch of fewer columns uses the first ones.
//
// Why one call covers 128 coordinates of one column:
// - CPU: 16 lanes run 16 counters, which are 16 neighbouring columns of z. A word holds 32 coordinates of its lane's
//   column, four bits are the index of one of the 16 signed sums of four coordinates, and one permute looks up 16
//   columns at once: no sign is ever unpacked.
// - Tensor cores: in B of mma.m16n8k16 (k: coordinates, n: columns) lane l holds four k of column l / 4. The order of k
//   is free if A has the same, so let lanes with l % 4 = w take the coordinates of word w: one word is then the lane's
//   whole share of eight k-steps. 32 lanes make one call each for 32 columns and trade the words through 512 bytes of
//   shared memory, one conflict-free load for eight products; no call is made twice.
// - Triton: words of [columns] shifted by arange(32) are four sign tiles [32, columns], each an operand of tl.dot.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define GVENDI_PHILOX static __host__ __device__ __forceinline__
#define GVENDI_UNROLL _Pragma("unroll")
#else
#define GVENDI_UNROLL _Pragma("GCC unroll 10")
#define GVENDI_PHILOX static inline __attribute__((always_inline))
#endif

namespace gvendi {

constexpr int kSignCoordinates = 128;  // coordinates of one column that one call covers

struct SignKey {
  uint32_t low, high;
};

// x * m as a 64-bit number, and the sum modulo 2 of three words. Vector words bring functions of the same names.
GVENDI_PHILOX void multiply(uint32_t x, uint32_t m, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(x) * m;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
GVENDI_PHILOX uint32_t mix(uint32_t x, uint32_t y, uint32_t key) { return x ^ y ^ key; }

// x: counter in, four random words out.
template <typename Word>
GVENDI_PHILOX void philox4x32_10(Word (&x)[4], SignKey key) {
  GVENDI_UNROLL
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(x[0], 0xD2511F53u, high0, low0);
    multiply(x[2], 0xCD9E8D57u, high1, low1);
    x[0] = mix(high1, x[1], key.low);
    x[1] = low1;
    x[2] = mix(high0, x[3], key.high);
    x[3] = low0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

// The words of coordinates 128 block .. 128 block + 127 of one column: 32 coordinates each, lowest bit first.
GVENDI_PHILOX void sign_words(SignKey key, uint64_t block, uint32_t column, uint32_t (&words)[4]) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = static_cast<uint32_t>(block >> 32);
  words[2] = column;
  words[3] = 0;
  philox4x32_10(words, key);
}

}  // namespace gvendi
