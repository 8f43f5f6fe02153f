// What the kernels ask of a GPU, each thing once. With GVENDI_EMULATE the kernels compile as host C++ over
// csrc/tests/cuda_emulate.h, which runs the threads of a block as fibers: the tests' proof of indices and barriers.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef GVENDI_EMULATE
#include "../tests/cuda_emulate.h"
#else
#include <cuda_runtime.h>

#define GV_DEVICE __device__ __forceinline__

namespace gvendi {

// The block's dynamic shared memory.
template <typename T>
GV_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}

GV_DEVICE void block_sync() { __syncthreads(); }
GV_DEVICE void warp_sync() { __syncwarp(); }
GV_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
GV_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
GV_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// The low or the high 16 bits of x and, above them, of y.
GV_DEVICE uint32_t low_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
GV_DEVICE uint32_t high_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

template <typename T>
GV_DEVICE T load_constant(const T* p) {
  return __ldg(p);
}

GV_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Two floats rounded to nearest even bfloat16, `low` in the low half.
GV_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The same in float16.
GV_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// c [16, 8] += a [16, 16] b [16, 8], bfloat16 pairs, float32 sums; all lanes of a warp call it. With g = lane / 4 and
// q = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): a[i] holds row g + 8 (i % 2), columns 2q + 8 (i / 2)
// and the next; b[i] rows 2q + 8 i and the next, column g; c[i] row g + 8 (i / 2), column 2q + i % 2.
GV_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with float16 pairs.
GV_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// What a launch without the driver's consent may use.
constexpr size_t kSharedBytes = 48 * 1024;

template <typename Params>
cudaError_t start(void (*kernel)(Params), int64_t blocks, int threads, size_t shared, void* stream,
                  const Params& params) {
  if (shared > kSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  // Unlike cudaGetLastError, this result is of this launch alone.
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace gvendi
#endif

namespace gvendi {

constexpr int64_t kMaxBlocks = 0x7fffffff;

// kernel(params) on `blocks` blocks; more than a grid has would otherwise be cut to 32 bits.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared, void* stream,
                   const Params& params) {
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  return start(kernel, blocks, threads, shared, stream, params);
}

}  // namespace gvendi
