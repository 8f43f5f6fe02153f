// out float64 [G]: entropy of order q of each group of rows boundaries[g] .. boundaries[g+1] of x [N, K].
// z_i = x_i / ||x_i||; C = Z Z^T [m, m], or Z^T Z [K, K] where K < m; l its eigenvalues over their sum;
//     ln(sum l^q) / (1 - q),   q = 1: -sum l ln l,   q = 2: -ln(||C||_F^2 / tr(C)^2),   q = inf: -ln max l.
// All in float64. A group whose rows are zero or not finite, or whose eigenvalues do not converge, gives NaN.

namespace {

constexpr double kRounding = 0x1p-46;  // parts of the trace below this are rounding of 256 rows
constexpr double kNoise = 0x1p-22;     // for orders below 1 those below this may be rounding of float32 rows

template <typename T>
GV_INLINE double inverse_norm(const T* x, int64_t K) {
  double lanes[kRun] = {0};
  const int64_t body = K / kRun * kRun;
  for (int64_t c = 0; c < body; c += kRun) {
    float held[kRun];
    store(held, load(x + c));
    for (int l = 0; l < kRun; ++l) lanes[l] += static_cast<double>(held[l]) * static_cast<double>(held[l]);
  }
  for (int64_t c = body; c < K; ++c)
    lanes[c - body] += static_cast<double>(scalar(x + c)) * static_cast<double>(scalar(x + c));
  return 1.0 / __builtin_sqrt(sum_lanes(lanes));
}

// The rows of one group; z is never whole in memory.
struct Group {
  const Rows& x;
  int64_t begin, rows, K;
  const double* inverse;  // [rows]
};

// panel [count, 16]: columns first .. first + count of 16 unit rows from `row` on, zeros beside the group.
template <typename T>
GV_INLINE void pack_rows(const Group& group, int64_t row, int64_t first, int64_t count, double* panel) {
  const int lanes = static_cast<int>(group.rows - row < kRun ? group.rows - row : kRun);
  if (lanes < kRun) memset(panel, 0, sizeof(double) * static_cast<size_t>(count * kRun));
  for (int l = 0; l < lanes; ++l) {
    const T* x = row_of<T>(group.x, group.begin + row + l) + first;
    const double inverse = group.inverse[row + l];
    for (int64_t c = 0; c < count; ++c) panel[c * kRun + l] = static_cast<double>(scalar(x + c)) * inverse;
  }
}

// panel [count, 16]: 16 columns from `column` on of the unit rows first .. first + count.
template <typename T>
GV_INLINE void pack_columns(const Group& group, int64_t column, int64_t first, int64_t count, double* panel) {
  const int lanes = static_cast<int>(group.K - column < kRun ? group.K - column : kRun);
  for (int64_t t = 0; t < count; ++t) {
    const T* x = row_of<T>(group.x, group.begin + first + t) + column;
    for (int l = 0; l < kRun; ++l)
      panel[t * kRun + l] = l < lanes ? static_cast<double>(scalar(x + l)) * group.inverse[first + t] : 0.0;
  }
}

// into [16, stride] += left^T right over `depth` rows of two panels.
GV_INLINE void add_product(const double* left, const double* right, int64_t depth, double* into, int64_t stride) {
  for (int n = 0; n < kRun; n += kGramParts * kDoubles)
    for (int m = 0; m < kRun; m += kGramRows) {
      Doubles sums[kGramRows][kGramParts];
#pragma GCC unroll 8
      for (int i = 0; i < kGramRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kGramParts; ++j) sums[i][j] = Doubles{};
      for (int64_t t = 0; t < depth; ++t) {
        Doubles y[kGramParts];
#pragma GCC unroll 2
        for (int j = 0; j < kGramParts; ++j) y[j] = load_doubles(right + t * kRun + n + j * kDoubles);
#pragma GCC unroll 8
        for (int i = 0; i < kGramRows; ++i) {
          const Doubles factor = all_doubles(left[t * kRun + m + i]);
#pragma GCC unroll 2
          for (int j = 0; j < kGramParts; ++j) sums[i][j] = sums[i][j] + factor * y[j];
        }
      }
      for (int i = 0; i < kGramRows; ++i)
        for (int j = 0; j < kGramParts; ++j) {
          double* at = into + (m + i) * stride + n + j * kDoubles;
          store_doubles(at, load_doubles(at) + sums[i][j]);
        }
    }
}

// matrix [side, side] = C, zeros beside it; panels [side, kEntropyDepth].
template <typename T>
void multiply(const Group& group, int64_t side, double* matrix, double* panels) {
  const bool gram = group.rows <= group.K;
  const int64_t depth = gram ? group.K : group.rows;
  memset(matrix, 0, sizeof(double) * static_cast<size_t>(side * side));
  for (int64_t first = 0; first < depth; first += kEntropyDepth) {
    const int64_t count = depth - first < kEntropyDepth ? depth - first : kEntropyDepth;
    for (int64_t i = 0; i < side; i += kRun) {
      if (gram)
        pack_rows<T>(group, i, first, count, panels + i * count);
      else
        pack_columns<T>(group, i, first, count, panels + i * count);
      for (int64_t j = 0; j <= i; j += kRun)
        add_product(panels + j * count, panels + i * count, count, matrix + j * side + i, side);
    }
  }
  for (int64_t i = 0; i < side; ++i)
    for (int64_t j = 0; j < i; ++j) matrix[i * side + j] = matrix[j * side + i];
}

// Renyi entropy of l [n] that sum to 1 but for rounding, without cancellation near q = 1 or underflow at large q.
double renyi(double* l, int64_t n, double q) {
  double total = 0.0, left = 0.0, largest = 0.0, sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(l[i] >= kRounding)) l[i] = 0.0;
    total += l[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    l[i] /= total;
    if (q < 1 && l[i] < kNoise) l[i] = 0.0;
    left += l[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    l[i] = q < 1 ? l[i] / left : l[i];
    if (l[i] > largest) largest = l[i];
  }
  const double top = log(largest);
  if (q == __builtin_inf()) return -top;
  const bool near_one = __builtin_fabs(q - 1.0) < 0.5;
  for (int64_t i = 0; i < n; ++i) {
    if (l[i] == 0.0) continue;
    const double logarithm = log(l[i]);
    if (q == 1)
      sum -= l[i] * logarithm;
    else if (near_one)
      sum += l[i] * expm1((q - 1.0) * logarithm);
    else
      sum += exp(q * (logarithm - top));
  }
  if (q == 1) return sum;
  return (near_one ? log1p(sum) : q * top + log(sum)) / (1.0 - q);
}

// buffer [entropy_buffer(m, K)].
template <typename T>
double group_entropy(const Rows& x, int64_t begin, int64_t rows, int64_t K, double q, double* buffer) {
  const int64_t least = rows < K ? rows : K, side = whole_runs(least);
  double *matrix = buffer, *panels = matrix + side * side, *diagonal = panels + side * kEntropyDepth;
  double *couplings = diagonal + side, *work = couplings + side, *inverse = work + 4 * side;
  for (int64_t i = 0; i < rows; ++i) {
    inverse[i] = inverse_norm(row_of<T>(x, begin + i), K);
    if (!(inverse[i] > 0 && inverse[i] < __builtin_inf())) return __builtin_nan("");
  }
  multiply<T>({x, begin, rows, K, inverse}, side, matrix, panels);
  double trace = 0.0;
  for (int64_t i = 0; i < least; ++i) trace += matrix[i * side + i];
  if (q == 2) {
    const double h = -log(dot(matrix, matrix, side * side) / (trace * trace));
    return h < kRounding ? 0.0 : h;
  }
  make_tridiagonal(matrix, least, side, diagonal, couplings, work);
  const double negligible = 0x1p-53 * trace;
  if (!ql(diagonal, couplings, least, negligible * negligible)) return __builtin_nan("");
  for (int64_t i = 0; i < least; ++i) diagonal[i] /= trace;
  const double h = renyi(diagonal, least, q);
  return h <= 0 ? 0.0 : h;
}

void entropy(const Rows& x, const int64_t* boundaries, int64_t G, int64_t K, double q, double* buffers, int64_t buffer,
             double* out, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < G; ++g) {
    const int64_t begin = boundaries[g], rows = boundaries[g + 1] - begin;
    double* own = buffers + thread_number() * buffer;
    out[g] = x.bf16 ? group_entropy<Bf16>(x, begin, rows, K, q, own) : group_entropy<float>(x, begin, rows, K, q, own);
  }
}

}  // namespace
