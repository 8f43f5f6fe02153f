// master float64 [K, K] += sum_i z_i z_i^T, z_i = x_i / ||x_i||, x [N, K]. Products are float32 and add up in row order
// over at most kCovarianceRows rows, then go to the master. Upper triangle of panels, mirrored at the end.

namespace {

// Row i scaled to unit length into panels [K / kPanel, rows, kPanel]; the norm is a double of 16 lanes.
template <typename T>
GV_INLINE void pack_row(const T* x, int K, int64_t row, int64_t rows, float* panels) {
  double squares[kRun] = {0};
  float held[kRun];
  for (int c = 0; c < K; c += kRun) {
    store(held, load(x + c));
    for (int l = 0; l < kRun; ++l) squares[l] += static_cast<double>(held[l]) * static_cast<double>(held[l]);
  }
  double total = 0.0;
  for (double lane : squares) total += lane;
  const double inverse = 1.0 / __builtin_sqrt(total);
  for (int c = 0; c < K; c += kRun) {
    store(held, load(x + c));
    for (float& value : held) value = static_cast<float>(static_cast<double>(value) * inverse);
    memcpy(panels + (c / kPanel * rows + row) * kPanel + c % kPanel, held, sizeof held);
  }
}

// master[i + m][j + n] += sum_t left[t][m] right[t][n] over one tile.
GV_INLINE void tile(const float* left, const float* right, int64_t rows, double* master, int K) {
  F sums[kTileRows][kTileRuns];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileRuns; ++n) sums[m][n] = zero();
  for (int64_t t = 0; t < rows; ++t) {
    F y[kTileRuns];
#pragma GCC unroll 2
    for (int n = 0; n < kTileRuns; ++n) y[n] = load(right + t * kPanel + n * kRun);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
      const F x = all(left[t * kPanel + m]);
#pragma GCC unroll 2
      for (int n = 0; n < kTileRuns; ++n) sums[m][n] = sums[m][n] + x * y[n];
    }
  }
  for (int m = 0; m < kTileRows; ++m)
    for (int n = 0; n < kTileRuns; ++n) {
      float held[kRun];
      store(held, sums[m][n]);
      double* into = master + static_cast<int64_t>(m) * K + n * kRun;
      for (int l = 0; l < kRun; ++l) into[l] += static_cast<double>(held[l]);
    }
}

void add_panel_pair(const float* panels, int64_t rows, int i, int j, double* master, int K) {
  const float *left = panels + i * rows * kPanel, *right = panels + j * rows * kPanel;
  double* corner = master + static_cast<int64_t>(i) * kPanel * K + j * kPanel;
  for (int n = 0; n < kPanel; n += kTileRuns * kRun)
    for (int m = 0; m < kPanel; m += kTileRows)
      tile(left + m, right + n, rows, corner + static_cast<int64_t>(m) * K + n, K);
}

void mirror(double* master, int i, int j, int K) {
  for (int m = 0; m < kPanel; ++m)
    for (int n = 0; n < kPanel; ++n) {
      const int64_t row = i * kPanel + m, column = j * kPanel + n;
      master[column * K + row] = master[row * K + column];
    }
}

void covariance(const Rows& x, int64_t N, int K, float* panels, double* master, int threads) {
  const int count = K / kPanel;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t begin = 0; begin < N; begin += kCovarianceRows) {
      const int64_t rows = N - begin < kCovarianceRows ? N - begin : kCovarianceRows;
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) {
        if (x.bf16)
          pack_row(row_of<Bf16>(x, begin + row), K, row, rows, panels);
        else
          pack_row(row_of<float>(x, begin + row), K, row, rows, panels);
      }
      // Long columns of the triangle first, so that the threads end together.
#pragma omp for schedule(dynamic, 1)
      for (int back = 0; back < count; ++back)
        for (int i = 0; i <= count - 1 - back; ++i) add_panel_pair(panels, rows, i, count - 1 - back, master, K);
    }
#pragma omp for schedule(dynamic, 1)
    for (int j = 0; j < count; ++j)
      for (int i = 0; i < j; ++i) mirror(master, i, j, K);
  }
}

}  // namespace
