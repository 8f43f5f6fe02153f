// What the kernels of the dense mode share: a block's samples times signs on tensor cores, and the sums that it leaves.
//
// A tile is 8 rows of 128 coordinates of each of kDenseSamples gradients, in shared memory. Each warp makes the signs
// of its 128 columns, once for all samples, and multiplies [samples x coordinates] by [coordinates x columns].
//
// Precision: with a power of two that brings a sample's largest number of a tile (of an embedding, of a row of it) to
// 2^14 .. 2^15, the sum of two float16 parts. Rounding to nearest leaves 2^-22 of a number behind them, or 2^-39 of the
// largest where that is more; two bfloat16 parts would leave 2^-16, which sums of a few hundred numbers show. All sums
// are float32. Tensor cores may truncate where they add, so a chain in them is one row of a tile long, and chains add
// up in ordinary arithmetic.
#pragma once

#include "../philox.h"
#include "hadamard.cuh"

namespace gvendi {

constexpr int kTileRows = 8;
constexpr int kParts = 2;
// A word holds two coordinates of one part of one sample. Step s of a row is what one product takes, four words a lane
// in the operand's order: with q = lane % 4, coordinates 32 q + 2 s + h and 16 further of samples lane / 4 and lane / 4
// + 8, first with h = 0, then with h = 1.
constexpr int kSteps = 8, kStepWords = 4 * 32;
// Four words more than a row, so that the rows of a warp's store lie in different banks.
constexpr int kRowPitch = kSteps * kStepWords + 4;
constexpr int kPartWords = kTileRows * kRowPitch;
static_assert(kRowPitch % 4 == 0, "16-byte words are aligned");
static_assert(kDenseSamples == 2 * kWarps, "samples warp and warp + 8 are a warp's");
static_assert(kSignCoordinates == 32 * 4 && kDenseSamples == 16, "fragments of m16n8k16");

// Of two float16, 1 and the bits of their signs.
constexpr uint32_t kOnes = 0x3c003c00, kSignBits = 0x80008000;

constexpr int kWarpColumns = kDenseColumns / kWarps;
constexpr int kColumnTiles = kWarpColumns / 8;
constexpr int kSignPitch = 40;
constexpr int kSignWords = 8 * kSignPitch;
// The planes of the parts, what takes the powers of two back [kTileRows, kDenseSamples], and the warps' signs.
constexpr int kDowns = kTileRows * kDenseSamples;
constexpr size_t kSharedWords = kParts * kPartWords + kDowns + kWarps * kSignWords;
static_assert(kSharedWords * sizeof(uint32_t) <= 160 * 1024, "fits sm_80");

// A power of two that brings `largest` to 2^14 .. 2^15, and one over it.
struct Scale {
  float up, down;
};
GV_DEVICE Scale scale_of(float largest) {
  // Below 2^-112 there is no such power of two.
  const uint32_t found = as_bits(largest) >> 23, exponent = found < 15 ? 15 : found;
  return {as_float((268 - exponent) << 23), as_float((exponent - 14) << 23)};
}

// The largest of |x| of all lanes; NaN does not count.
GV_DEVICE float largest_of(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// float16 pairs that add up to (low, high).
GV_DEVICE void split(uint32_t (&parts)[kParts], float low, float high) {
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
    const uint32_t pair = pack_f16(low, high);
    parts[n] = pair;
    low -= half_to_float(static_cast<uint16_t>(pair));
    high -= half_to_float(static_cast<uint16_t>(pair >> 16));
  }
}

// Sixteen bytes of every plane; `near` and `far` are the parts of samples warp and warp + 8, h = 0 and 1.
GV_DEVICE void store_parts(uint32_t* to, const uint32_t (&near)[2][kParts], const uint32_t (&far)[2][kParts]) {
#pragma unroll
  for (int n = 0; n < kParts; ++n)
    *reinterpret_cast<uint4*>(to + n * kPartWords) = {near[0][n], far[0][n], near[1][n], far[1][n]};
}

// words[n]: the signs of coordinates j + 32 quad .. + 31 in column first + 8 n + group. One call of philox covers 128
// coordinates from a multiple of 128; a row that begins elsewhere needs two.
GV_DEVICE void row_signs(uint32_t (&words)[kColumnTiles], SignKey key, int64_t j, int first, uint32_t* signs,
                         int lane) {
  const int group = lane / 4, quad = lane % 4;
  const uint64_t block = static_cast<uint64_t>(j) / kSignCoordinates;
  const int skip = static_cast<int>(j % kSignCoordinates), from = skip / 32 + quad, shift = skip % 32;
#pragma unroll
  for (int n = 0; n < kColumnTiles; n += 4) {
    const uint32_t column = static_cast<uint32_t>(first + 8 * n + lane);
    uint32_t made[4];
    sign_words(key, block, column, made);
#pragma unroll
    for (int w = 0; w < 4; ++w) signs[w * kSignPitch + lane] = made[w];
    if (skip != 0) {
      sign_words(key, block + 1, column, made);
#pragma unroll
      for (int w = 0; w < 4; ++w) signs[(4 + w) * kSignPitch + lane] = made[w];
    }
    warp_sync();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t* word = signs + from * kSignPitch + 8 * c + group;
      words[n + c] = shift == 0 ? word[0] : word[0] >> shift | word[kSignPitch] << (32 - shift);
    }
    warp_sync();
  }
}

// z += one row of the tile, all samples, times its signs. Bit k of a word is coordinate k of the lane's 32.
// sign_bits is kSignBits in a register: an instruction takes one constant, and each sign is one instruction.
GV_DEVICE void project_row(float (&z)[kColumnTiles][4], const uint32_t* row, const float* downs,
                           const uint32_t (&words)[kColumnTiles], uint32_t sign_bits, int lane) {
  const uint32_t* at = row + 4 * lane;
  const float down[2] = {downs[lane / 4], downs[lane / 4 + 8]};
#pragma unroll
  for (int half = 0; half < kColumnTiles; half += kColumnTiles / 2) {
    float sum[kColumnTiles / 2][4] = {};
    // Unrolled further, the operands of all steps are loaded at once and spill.
#pragma unroll 1
    for (int s = 0; s < kSteps; ++s) {
      uint32_t left[kParts][4];
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        const uint4 w = *reinterpret_cast<const uint4*>(at + n * kPartWords + s * kStepWords);
        left[n][0] = w.x, left[n][1] = w.y, left[n][2] = w.z, left[n][3] = w.w;
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles / 2; ++c) {
        // +-1 in float16: the sign bits of coordinates 2 s and 2 s + 16, then of 2 s + 1 and 2 s + 17.
        const uint32_t word = words[half + c];
        const uint32_t right[2] = {(word << (15 - 2 * s) & sign_bits) | kOnes,
                                   (word << (14 - 2 * s) & sign_bits) | kOnes};
#pragma unroll
        for (int n = kParts - 1; n >= 0; --n) mma_f16(sum[c], left[n], right);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnTiles / 2; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) z[half + c][i] += sum[c][i] * down[i / 2];
  }
}

// The block's row of partial.
GV_DEVICE void store_sums(const DenseSums& p, const float (&z)[kColumnTiles][4], int64_t slab, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int sample = lane / 4 + 8 * (i / 2), column = warp * kWarpColumns + 8 * n + 2 * (lane % 4) + i % 2;
      if (p.column + column < p.K)
        p.partial[(slab * kDenseSamples + sample) * kDenseColumns + column] = z[n][i];
    }
}

// out += scale times the sum of p.slabs rows of partial, in order; defined in dense_sketch.cu.
cudaError_t dense_reduce(const DenseSums& p, void* stream);

// `kernel` on every kDenseColumns columns, each time followed by its reduction.
template <typename Params>
cudaError_t launch_columns(void (*kernel)(Params), Params p, void* stream) {
  for (p.column = 0; p.column < p.K; p.column += kDenseColumns) {
    cudaError_t error = launch(kernel, p.slabs, kThreads, kSharedWords * sizeof(uint32_t), stream, p);
    if (error == cudaSuccess) error = dense_reduce(p, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether a launch takes these sums; it sets slabs and column itself.
inline bool takes(const DenseSums& p) {
  return p.samples >= 0 && p.samples <= kDenseSamples && p.K > 0 && p.K % kDenseStep == 0;
}

}  // namespace gvendi
