// The kernels' calling convention and the choice of the instruction set.
// Letters: T rows, K sketch dimension, V vocabulary, B samples. All pointers are the caller's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dense.h"
#include "table.h"

namespace gvendi {

constexpr int kChunkRows = 64;        // rows of one sample that are summed before anything else is added
constexpr int kCovarianceRows = 256;  // rows whose products are summed in float32 before the float64 master
constexpr int kPanel = 32;            // columns of one packed covariance panel
constexpr int kEntropyDepth = 128;    // terms of a Gram matrix's products that are packed at once
constexpr int kPad = 32;              // floats between per-thread buffers, against 4 KiB aliasing

// Rows of float32 or bfloat16 with unit stride inside a row; table null: already folded, float32 [T, K].
struct Rows {
  const void* data;
  int64_t stride;
  bool bf16;
  const TableView* table;
};

// Rows with the table of each expert.
struct ExpertRows {
  const void* data;
  int64_t stride;
  bool bf16;
  const TableView* tables;
};

// Rows by sample and, within a sample, by expert: order[i] is the i-th row, expert[r] the expert of row r.
struct Routing {
  const int64_t *order, *expert;
};

// Sample b owns chunks first[b] .. first[b+1]; chunk c covers rows begin[c] .. end[c].
struct Chunks {
  int64_t samples, count;
  const int64_t *first, *begin, *end;
};

constexpr int kGainColumns = 8;      // columns of the gain table come in groups of so many
constexpr int kGainMaxColumns = 64;  // of a gain table; 56 are enough up to 10^12 rows

// Nodes t and weights w [J], sign +-1, and the table [K, C]; C is a multiple of kGainColumns, at least J + 2.
struct GainNodes {
  int sign, J, C;
  const double *t, *weight, *table;
};

// Where `assign` writes, each [N]; label -1 and cosine NaN where there is none.
struct Nearests {
  int64_t *label, *second;
  float *cosine, *second_cosine;
};

enum class Norm : int { kNone, kRms, kLayer };

// Doubles of one thread's buffers: the matrix, its panels, six vectors and the rows' norms.
static constexpr int64_t entropy_buffer(int64_t rows, int64_t K) {
  const int64_t side = ((rows < K ? rows : K) + kRun - 1) / kRun * kRun;
  return side * (side + kEntropyDepth + 6) + rows + kPad;
}

// Every function is a pure function of its inputs: bitwise the same for any number of threads and any ISA.
struct Kernels {
  // out [T, K] = H S x.
  void (*fold_hadamard)(const Rows& x, int64_t T, int K, float* out, int threads);
  // out [B, K] += K^-1/2 sum_t (H S a_t) * (H sum_p S_p e_pt); partial [chunks, K], buffers [threads, 2, K + kPad].
  void (*linear_sketch)(const Rows& a, const Rows* parts, int count, const Chunks& chunks, int K, float* partial,
                        float* buffers, float* out, int threads);
  // out [B, K] += K^-1/2 sum_r (H S^x a_r) * (H S^x e_r), x the expert of row r; a null: its factor is 1. Chunks are of
  // rows in order; partial [chunks, K], buffers [threads, 2, K + kPad].
  void (*expert_sketch)(const ExpertRows* a, const ExpertRows& e, const Routing& routing, const Chunks& chunks, int K,
                        float* partial, float* buffers, float* out, int threads);
  // out [B, K] += K^-1/2 sum_t (H S_V onehot(id_t)) * (H S e_t); partial [chunks, K].
  void (*token_sketch)(const int64_t* ids, const TableView& id_table, const Rows& e, const Chunks& chunks, int K,
                       float* partial, float* out, int threads);
  // out [B, K] += K^-1/2 H S sum_t e_t * x_hat_t; partial [chunks, round_up(d, 16)], buffers [threads, 2, K + kPad].
  void (*vector_sketch)(const Rows* x, const Rows& e, const Chunks& chunks, int K, Norm norm, double eps,
                        float* partial, float* buffers, float* out, int threads);
  // x [T, V] raw logits -> their gradient, loss [T], folded [T, K] unless it is null; work [threads, round_up(V, 16)]
  // where x is bfloat16 or cap > 0 (no cap: 0).
  void (*softmax_fold)(void* x, int64_t stride, bool bf16, int64_t T, const int64_t* labels, const TableView& table,
                       float cap, float scale, float* work, float* loss, float* folded, int threads);
  // master float64 [K, K] += sum_i z_i z_i^T of the rows scaled to unit length; panels [kCovarianceRows, K].
  void (*covariance)(const Rows& x, int64_t N, int K, float* panels, double* master, int threads);
  // out [4, N], row stride `stride`: how tr(A ln A) changes with each row of coordinates c [N, K], double where wide.
  void (*gain)(const void* c, bool wide, int64_t N, int K, const GainNodes& at, double* out, int64_t stride,
               int threads);
  // out [B, K] += K^-1/2 Pi^T vec(sum_t e_t a_t^T), a [T, I], e [T, O], samples at segments [B, 2]; partial
  // [B, dense_groups(O, I), K], buffers [threads, dense_buffer(B, K)].
  void (*dense_sketch)(const Rows& a, int64_t I, const Rows& e, int64_t O, const int64_t* segments, int64_t samples,
                       int K, SignKey key, float* partial, float* buffers, float* out, int threads);
  // The same for an embedding, sum_t onehot(id_t) e_t^T, e [T, d]; partial [B, kDenseGroups, K].
  void (*dense_token_sketch)(const Touches& touches, const Rows& e, int64_t d, int64_t samples, int K, SignKey key,
                             float* partial, float* buffers, float* out, int threads);
  // out [G] = entropy of order q of the rows boundaries[g] .. boundaries[g+1] of x [N, K], NaN where it cannot be
  // found; buffers [threads, buffer], buffer = entropy_buffer(rows of the largest group, K).
  void (*entropy)(const Rows& x, const int64_t* boundaries, int64_t G, int64_t K, double q, double* buffers,
                  int64_t buffer, double* out, int threads);
  // The two of the unit centroids [C, K] with the largest cosine to each row, ties to the lower; scores [N, C] (or null)
  // are products <x_n, c> within margin / 2 * ||x_n||; buffers [threads, round_up(K, 16)].
  void (*assign)(const Rows& x, int64_t N, int64_t K, const float* centroids, int64_t C, const float* scores,
                 double margin, float* buffers, const Nearests& out, int threads);
};

extern const Kernels kernels_baseline;
#ifdef GVENDI_HAVE_X86_ISAS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Names of the instruction sets that this build has and this CPU runs, narrowest first.
std::vector<std::string> available_isas();
// "auto" or one of available_isas(); std::invalid_argument with the list otherwise.
void set_isa(const std::string& name);
std::string current_isa();
const Kernels& kernels();

}  // namespace gvendi
