// out [T, K] = H S x, x [T, d].

namespace {

void fold_hadamard(const Rows& x, int64_t T, int K, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < T; ++t) {
    float* row = out + t * K;
    transform_rest(row, K, fold_row(&x, 1, t, K, row));
  }
}

}  // namespace
