// out [B, K] += K^-1/2 H S v_b, v_b = sum_t e_t (bias) or sum_t e_t * x_hat_t (norm weight); x, e [T, d].
// rms: x_hat = x / sqrt(mean(x^2) + eps); layer: x_hat = (x - mean) / sqrt(var + eps).

namespace {

template <typename T>
GV_INLINE F load_at(const T* x, int64_t j, int64_t d) {
  return d - j >= kRun ? load(x + j) : load_masked(x + j, (1u << (d - j)) - 1);
}

constexpr int64_t kNormBlock = 16 * kRun;  // coordinates whose float32 sum goes to a double

// Sum over a row of x - shift or of its square; lanes past d add nothing.
template <bool kSquare, typename T>
GV_INLINE double row_sum(const T* x, int64_t d, F shift) {
  double total = 0.0;
  for (int64_t block = 0; block < d; block += kNormBlock) {
    F lanes = zero();
    for (int64_t j = block; j < d && j < block + kNormBlock; j += kRun) {
      F x_j = load_at(x, j, d) - shift;
      if (d - j < kRun) x_j = select_first(x_j, static_cast<int>(d - j), zero());
      lanes = lanes + (kSquare ? x_j * x_j : x_j);
    }
    total += static_cast<double>(sum(lanes));
  }
  return total;
}

template <typename X, typename E>
GV_INLINE void add_scaled_rows(float* v, const X* x, const E* e, int64_t d, Norm norm, double eps) {
  const double width = static_cast<double>(d);
  const F mean = norm == Norm::kLayer ? all(static_cast<float>(row_sum<false>(x, d, zero()) / width)) : zero();
  const F scale = all(static_cast<float>(1.0 / __builtin_sqrt(row_sum<true>(x, d, mean) / width + eps)));
  for (int64_t j = 0; j < d; j += kRun)
    store(v + j, load(v + j) + (load_at(x, j, d) - mean) * scale * load_at(e, j, d));
}

template <typename E>
GV_INLINE void add_row(float* v, const Rows* x, const E* e, int64_t t, int64_t d, Norm norm, double eps) {
  if (norm == Norm::kNone) {
    for (int64_t j = 0; j < d; j += kRun) store(v + j, load(v + j) + load_at(e, j, d));
  } else if (x->bf16) {
    add_scaled_rows(v, row_of<Bf16>(*x, t), e, d, norm, eps);
  } else {
    add_scaled_rows(v, row_of<float>(*x, t), e, d, norm, eps);
  }
}

void vector_sketch(const Rows* x, const Rows& e, const Chunks& chunks, int K, Norm norm, double eps, float* partial,
                   float* buffers, float* out, int threads) {
  const int64_t d = e.table->width, padded = (d + kRun - 1) / kRun * kRun;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* buffer = buffers + thread_number() * 2 * static_cast<int64_t>(K + kPad);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      float* v = partial + chunk * padded;
      memset(v, 0, sizeof(float) * static_cast<size_t>(padded));
      for (int64_t t = chunks.begin[chunk]; t < chunks.end[chunk]; ++t) {
        if (e.bf16)
          add_row(v, x, row_of<Bf16>(e, t), t, d, norm, eps);
        else
          add_row(v, x, row_of<float>(e, t), t, d, norm, eps);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < chunks.samples; ++b)
      if (chunks.first[b] < chunks.first[b + 1]) {
        reduce_chunks(partial, chunks.first[b], chunks.first[b + 1], padded);
        const Rows v = {partial + chunks.first[b] * padded, 0, false, e.table};
        transform_rest(buffer, K, fold_row(&v, 1, 0, K, buffer));
        add_scaled(out + b * K, buffer, inverse_sqrt(K), K);
      }
  }
}

}  // namespace
