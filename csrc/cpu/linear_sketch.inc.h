// out [B, K] += K^-1/2 sum_t (H S_i a_t) * (H sum_p S_p e_pt) over each sample's rows; a [T, I], e_p [T, O_p].
// Rows of a chunk add up in order into partial [chunks, K], the chunks of a sample in order into out.

namespace {

// sum += (last stages of x) * (last stages of y), the last stages being radix Q; with kDone x has had its own.
template <int Q, bool kDone>
GV_INLINE void product(const float* x, const float* y, float* sum, int K) {
  const int step = K / Q;
  for (int j = 0; j < step; j += kRun) {
    F a[Q], b[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      a[q] = load(x + j + q * step);
      b[q] = load(y + j + q * step);
    }
    if (!kDone) butterflies<1>(a);
    butterflies<1>(b);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) store(sum + j + q * step, load(sum + j + q * step) + a[q] * b[q]);
  }
}

template <bool kDone>
GV_INLINE void product(int radix, const float* x, const float* y, float* sum, int K) {
  if (radix == 4) product<4, kDone>(x, y, sum, K);
  if (radix == 2) product<2, kDone>(x, y, sum, K);
  if (radix == 1) product<1, kDone>(x, y, sum, K);
}

GV_INLINE void prefetch_row(const Rows& x, int64_t t, int K) {
  const int64_t width = x.table == nullptr ? K : x.table->width;
  if (x.bf16)
    prefetch(row_of<Bf16>(x, t), width);
  else
    prefetch(row_of<float>(x, t), width);
}

// sum += (H S a_t) * (H sum_p S_p e_pt) of one row.
GV_INLINE void sketch_row(const Rows& a, const Rows* parts, int count, int64_t t, int K, float* left, float* right,
                          float* sum) {
  const int distance = fold_row(parts, count, t, K, right);
  const int radix = last_radix(K, distance);
  middle_passes(right, K, distance);
  if (a.table == nullptr) {
    product<true>(radix, row_of<float>(a, t), right, sum, K);
  } else {
    fold_row(&a, 1, t, K, left);
    middle_passes(left, K, distance);
    product<false>(radix, left, right, sum, K);
  }
}

void sketch_chunk(const Rows& a, const Rows* parts, int count, int64_t begin, int64_t end, int K, float* left,
                  float* right, float* sum) {
  memset(sum, 0, sizeof(float) * static_cast<size_t>(K));
  for (int64_t t = begin; t < end; ++t) {
    // Runs are read in random order, which no hardware prefetcher follows.
    if (t + 1 < end) {
      prefetch_row(a, t + 1, K);
      for (int p = 0; p < count; ++p) prefetch_row(parts[p], t + 1, K);
    }
    sketch_row(a, parts, count, t, K, left, right, sum);
  }
}

void linear_sketch(const Rows& a, const Rows* parts, int count, const Chunks& chunks, int K, float* partial,
                   float* buffers, float* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* left = buffers + thread_number() * 2 * static_cast<int64_t>(K + kPad);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk)
      sketch_chunk(a, parts, count, chunks.begin[chunk], chunks.end[chunk], K, left, left + K + kPad,
                   partial + chunk * K);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < chunks.samples; ++b)
      if (chunks.first[b] < chunks.first[b + 1]) {
        reduce_chunks(partial, chunks.first[b], chunks.first[b + 1], K);
        add_scaled(out + b * K, partial + chunks.first[b] * K, inverse_sqrt(K), K);
      }
  }
}

}  // namespace
