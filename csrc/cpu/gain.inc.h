// out [4, N] = Delta S, mu, excess and r of every row of coordinates c [N, K]. e_k = c_k^2, r = sum_k e_k, and table
// [K, C] = [1, lambda_k, 1 / (lambda_k + t_j), 0..]: mu = sum_k e_k lambda_k / r, g_j = sum_k e_k / (lambda_k + t_j) / r,
//   Delta S = phi(mu + sign) - phi(mu) + sum_j w_j ln1p(sign (1 / (mu + t_j) - g_j) / (1 + sign g_j)),  phi(x) = x ln x
// excess = max over t_j > 1e-2 of g_j (1 + t_j) - 1. Every sum over k is one double per row and column, k ascending.

namespace {

constexpr int kGainStep = 64;  // k's whose energies and rows of the table stay in L1
constexpr int kGainVectors = kGainColumns / kDoubles;

// sums[m][0..8) += sum_k energy[k][m] table[k][0..8) over a step.
GV_INLINE void gain_tile(const double* energy, int steps, const double* table, int C, double* sums) {
  Doubles total[kTileRows][kGainVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kGainVectors; ++v) total[m][v] = load_doubles(sums + m * C + v * kDoubles);
  for (int k = 0; k < steps; ++k) {
    Doubles w[kGainVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kGainVectors; ++v) w[v] = load_doubles(table + static_cast<int64_t>(k) * C + v * kDoubles);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kGainVectors; ++v) total[m][v] = total[m][v] + energy[k * kTileRows + m] * w[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kGainVectors; ++v) memcpy(sums + m * C + v * kDoubles, &total[m][v], sizeof(Doubles));
}

// kTileRows rows from c; of `rows` there are fewer at the end, and the others add zeros.
template <typename T>
GV_INLINE void gain_sums(const T* c, int64_t rows, int K, const double* table, int C, double* sums) {
  double energy[kGainStep * kTileRows];
  memset(energy, 0, sizeof energy);
  memset(sums, 0, sizeof(double) * static_cast<size_t>(kTileRows * C));
  for (int first = 0; first < K; first += kGainStep) {
    const int steps = K - first < kGainStep ? K - first : kGainStep;
    for (int64_t m = 0; m < rows; ++m)
      for (int k = 0; k < steps; ++k) {
        const double x = static_cast<double>(c[m * K + first + k]);
        energy[k * kTileRows + m] = x * x;
      }
    for (int n = 0; n < C; n += kGainColumns)
      gain_tile(energy, steps, table + static_cast<int64_t>(first) * C + n, C, sums + n);
  }
}

GV_INLINE double x_log_x(double x) { return x > 0.0 ? x * log(x) : 0.0; }

void gain_row(const GainNodes& at, const double* sums, double* out, int64_t N) {
  const double r = sums[0], sign = at.sign;
  double mu = sums[1] / r, integral = 0.0, excess = 0.0;
  // A >= x x^T where x leaves; beyond these bounds is rounding only, and the logarithm stays finite.
  if (at.sign < 0 && mu < 1.0) mu = 1.0;
  for (int j = 0; j < at.J; ++j) {
    const double t = at.t[j], bound = 1.0 / (1.0 + t);
    double g = sums[2 + j] / r;
    const double over = g * (1.0 + t) - 1.0;
    if (t > 1e-2 && !(over <= excess)) excess = over;
    if (at.sign < 0 && g > bound) g = bound;
    integral += at.weight[j] * log1p(sign * (1.0 / (mu + t) - g) / (1.0 + sign * g));
  }
  out[0] = x_log_x(mu + sign) - x_log_x(mu) + integral;
  out[N] = mu;
  out[2 * N] = excess;
  out[3 * N] = r;
}

template <typename T>
GV_INLINE void gain_rows(const T* c, int64_t N, int K, const GainNodes& at, double* out, int64_t stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t tile = 0; tile < (N + kTileRows - 1) / kTileRows; ++tile) {
    double sums[kTileRows * kGainMaxColumns];
    const int64_t first = tile * kTileRows, rows = N - first < kTileRows ? N - first : kTileRows;
    gain_sums(c + first * K, rows, K, at.table, at.C, sums);
    for (int64_t m = 0; m < rows; ++m) gain_row(at, sums + m * at.C, out + first + m, stride);
  }
}

void gain(const void* c, bool wide, int64_t N, int K, const GainNodes& at, double* out, int64_t stride, int threads) {
  if (wide)
    gain_rows(static_cast<const double*>(c), N, K, at, out, stride, threads);
  else
    gain_rows(static_cast<const float*>(c), N, K, at, out, stride, threads);
}

}  // namespace
