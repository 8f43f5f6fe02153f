// A block of CUDA threads on one CPU thread: every thread is a fiber that runs until it meets a barrier. The order in
// which warps and lanes run is a setting, so that a missing barrier shows as a result that changes with the order.
// Shared memory is filled with NaN before each block and has a guard behind it. A barrier that not all reach aborts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define GV_DEVICE inline

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct Index {
  unsigned x;
};

namespace gvendi {

enum class Wait { kNone, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Wait wait;
};

struct Block {
  static constexpr int kLane = 32;
  static constexpr size_t kStack = 256 * 1024, kGuard = 4096;

  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  // What the lanes of each warp show each other; two generations, so that one barrier per exchange is enough.
  std::vector<uint32_t> slots[2];
  std::vector<int> generation;
  std::function<void()> body;
  int current = 0, threads = 0, order = 0;
};

inline Block block;
inline Index threadIdx, blockIdx;

inline void fail(const char* what) {
  std::fprintf(stderr, "emulated block: %s\n", what);
  std::abort();
}

inline void enter() {
  block.body();
  block.fibers[static_cast<size_t>(block.current)].wait = Wait::kDone;
}

inline void wait_for(Wait what) {
  Fiber& fiber = block.fibers[static_cast<size_t>(block.current)];
  fiber.wait = what;
  swapcontext(&fiber.context, &block.scheduler);
}

// Threads first .. first + count may go on if all of them wait at this barrier.
inline bool release(Wait what, int first, int count) {
  for (int t = first; t < first + count; ++t)
    if (block.fibers[static_cast<size_t>(t)].wait != what) return false;
  for (int t = first; t < first + count; ++t) block.fibers[static_cast<size_t>(t)].wait = Wait::kNone;
  return true;
}

// 0 .. n - 1 in the block's order: forward, reversed or random.
inline std::vector<int> ordered(int n) {
  std::vector<int> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  if (block.order == 1) std::reverse(order.begin(), order.end());
  if (block.order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(block.order)));
  return order;
}

// Runs the lanes of a warp that may run; whether there were any.
inline bool run_warp(int warp, const std::vector<int>& lanes) {
  bool moved = false;
  for (const int lane : lanes) {
    const int t = warp * Block::kLane + lane;
    if (block.fibers[static_cast<size_t>(t)].wait != Wait::kNone) continue;
    block.current = t;
    threadIdx.x = static_cast<unsigned>(t);
    swapcontext(&block.scheduler, &block.fibers[static_cast<size_t>(t)].context);
    moved = true;
  }
  release(Wait::kWarp, warp * Block::kLane, Block::kLane);
  return moved;
}

inline void run_block(size_t shared) {
  block.shared.assign(shared + Block::kGuard, 0xff);
  const std::vector<int> warps = ordered(block.threads / Block::kLane), lanes = ordered(Block::kLane);
  for (Fiber& fiber : block.fibers) {
    getcontext(&fiber.context);
    fiber.stack.resize(Block::kStack);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &block.scheduler;
    fiber.wait = Wait::kNone;
    makecontext(&fiber.context, enter, 0);
  }
  // A warp runs as far as the block's barriers let it before the next one moves.
  do {
    for (const int warp : warps)
      while (run_warp(warp, lanes)) {
      }
  } while (release(Wait::kBlock, 0, block.threads));
  for (const Fiber& fiber : block.fibers)
    if (fiber.wait != Wait::kDone) fail("a barrier that not all threads reach");
  for (size_t i = shared; i < block.shared.size(); ++i)
    if (block.shared[i] != 0xff) fail("a write past the end of shared memory");
}

template <typename Params>
cudaError_t start(void (*kernel)(Params), int64_t blocks, int threads, size_t shared, void*, const Params& params) {
  block.threads = threads;
  block.fibers.resize(static_cast<size_t>(threads));
  for (auto& slots : block.slots) slots.assign(static_cast<size_t>(threads) * 8, 0);
  block.generation.assign(static_cast<size_t>(threads), 0);
  block.body = [&] { kernel(params); };
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    run_block(shared);
  }
  return cudaSuccess;
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(block.shared.data());
}

inline void block_sync() { wait_for(Wait::kBlock); }
inline void warp_sync() { wait_for(Wait::kWarp); }

// Shows `words` to the warp; returns what its lanes showed, 8 words each.
inline const uint32_t* exchange(const uint32_t* words, int count) {
  const int self = block.current;
  std::vector<uint32_t>& slots = block.slots[block.generation[static_cast<size_t>(self)] ^= 1];
  std::memcpy(&slots[static_cast<size_t>(self) * 8], words, sizeof(uint32_t) * static_cast<size_t>(count));
  warp_sync();
  return &slots[static_cast<size_t>(self / Block::kLane * Block::kLane) * 8];
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint32_t low_halves(uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; }
inline uint32_t high_halves(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }

inline float shuffle_xor(float x, int mask) {
  const uint32_t bits = as_bits(x);
  return as_float(exchange(&bits, 1)[((block.current % Block::kLane) ^ mask) * 8]);
}

template <typename T>
T load_constant(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("a load that is not aligned");
  return *p;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13, sign = static_cast<uint32_t>(bits >> 15) << 31;
  if ((bits & 0x7c00) == 0x7c00) return as_float(sign | 0x7f800000u | magnitude);
  return as_float(sign | as_bits(as_float(magnitude) * 0x1p112f));
}

inline uint32_t round_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline uint32_t round_f16(float x) {
  const uint32_t sign = as_bits(x) >> 31 << 15, bits = as_bits(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fffu;
  // From 65,520 on to infinity; below 2^-14 the sum's last place is float16's, 2^-24.
  if (bits >= 0x477ff000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) return sign | (as_bits(as_float(bits) + 0.5f) - as_bits(0.5f));
  return sign | ((bits - (112u << 23) + 0xfffu + (bits >> 13 & 1)) >> 13);
}
inline uint32_t pack_f16(float low, float high) { return round_f16(low) | round_f16(high) << 16; }

// The fragments' layout as csrc/cuda/device.h quotes it from the PTX ISA; half(word, k) is number k % 2 of a pair.
template <typename Half>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Half& half) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t* all = exchange(words, 6);
  const int lane = block.current % Block::kLane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      sum += half(all[(row % 8 * 4 + quad) * 8 + row / 8 + 2 * (k / 8)], k) *
             half(all[(column * 4 + quad) * 8 + 4 + k / 8], k);
    }
    c[i] = sum;
  }
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(c, a, b, [](uint32_t word, int k) { return as_float(k % 2 ? word & 0xffff0000u : word << 16); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma(c, a, b, [](uint32_t word, int k) { return half_to_float(static_cast<uint16_t>(k % 2 ? word >> 16 : word)); });
}

}  // namespace gvendi

using gvendi::blockIdx;
using gvendi::threadIdx;

inline int cudaSetDevice(int) { return 0; }
inline int cudaGetDeviceCount(int* count) { return *count = 0; }
inline const char* cudaGetErrorString(int error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration";
}
