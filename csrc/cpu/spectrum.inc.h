// Eigenvalues of a symmetric matrix A float64 [n, n], in any order, to a few 2^-53 of its trace. Reflections
// I - v v^T / h, h = v^T v / 2, from the last row upwards make A tridiagonal (Householder 1958):
//     p = A v / h,   w = p - (v^T p / 2h) v,   A <- A - v w^T - w v^T
// and the QL iteration in squares, which needs one root a sweep (Pal, Walker and Kahan; Reinsch 1973), its eigenvalues.
// Vectors and rows of A end in whole runs of 16; sums over a vector are 16 lanes and a tree, everything else is
// elementwise, so that the bits do not depend on the width of a register.

namespace {

constexpr int kSweepRows = 4;     // rows of A that share one pass over v, w and p
constexpr int kQlSweeps = 60;     // of one eigenvalue; two are usual
constexpr double kTiny = 0x1p-600;  // a sum of squares below this is 0: its root is far below any rounding

static constexpr int64_t whole_runs(int64_t n) { return (n + kRun - 1) / kRun * kRun; }

GV_INLINE double sum_lanes(double (&lanes)[kRun]) {
  for (int half = kRun / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// x^T y over whole runs.
GV_INLINE double dot(const double* x, const double* y, int64_t n) {
  constexpr int kParts = kRun / kDoubles;
  Doubles sums[kParts];
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) sums[i] = Doubles{};
  for (int64_t c = 0; c < n; c += kRun)
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i)
      sums[i] = sums[i] + load_doubles(x + c + i * kDoubles) * load_doubles(y + c + i * kDoubles);
  double lanes[kRun];
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) store_doubles(lanes + i * kDoubles, sums[i]);
  return sum_lanes(lanes);
}

struct Reflection {
  double image, inverse;  // (I - v v^T / h) x = (0, ..., 0, image), inverse = 1 / h; 0 where v is 0
};

// x [n], with zeros up to a whole run, becomes v.
GV_INLINE Reflection reflect(double* x, int64_t n) {
  const double last = x[n - 1];
  x[n - 1] = 0.0;
  const double rest = dot(x, x, whole_runs(n));
  if (!(rest > kTiny)) {
    memset(x, 0, sizeof(double) * static_cast<size_t>(n));
    return {last, 0.0};
  }
  const double norm = __builtin_sqrt(rest + last * last);
  // Of the opposite sign, so that nothing cancels in v.
  const double image = last > 0 ? -norm : norm;
  x[n - 1] = last - image;
  return {image, 1.0 / (norm * (norm + __builtin_fabs(last)))};
}

// R rows of A [*, columns] take -v w^T - w v^T of the step before, and p += A^T next over them.
template <int R>
GV_INLINE void sweep(double* a, int64_t stride, int64_t row, int64_t columns, const double* v, const double* w,
                     const double* next, double* p) {
  Doubles v_row[R], w_row[R], next_row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    v_row[r] = all_doubles(v[row + r]);
    w_row[r] = all_doubles(w[row + r]);
    next_row[r] = all_doubles(next[row + r]);
  }
  for (int64_t c = 0; c < columns; c += kDoubles) {
    const Doubles v_here = load_doubles(v + c), w_here = load_doubles(w + c);
    Doubles sum = load_doubles(p + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      double* at = a + (row + r) * stride + c;
      const Doubles x = load_doubles(at) - (v_row[r] * w_here + w_row[r] * v_here);
      store_doubles(at, x);
      sum = sum + next_row[r] * x;
    }
    store_doubles(p + c, sum);
  }
}

// A [n, stride] -> diagonal [n] and squared couplings [n], couplings[i] between i and i + 1; A is lost. work [4 stride].
void make_tridiagonal(double* a, int64_t n, int64_t stride, double* diagonal, double* couplings, double* work) {
  double *v = work, *w = work + stride, *next = work + 2 * stride, *p = work + 3 * stride;
  memset(work, 0, sizeof(double) * static_cast<size_t>(4 * stride));
  couplings[n - 1] = 0.0;
  for (int64_t i = n - 1; i >= 0; --i) {
    // Row i first, for the next reflection; the others take the update in the pass that multiplies with that.
    double* row = a + i * stride;
    for (int64_t c = 0; c <= i; ++c) row[c] -= v[i] * w[c] + w[i] * v[c];
    diagonal[i] = row[i];
    if (i == 0) break;
    const int64_t columns = whole_runs(i);
    memcpy(next, row, sizeof(double) * static_cast<size_t>(i));
    memset(next + i, 0, sizeof(double) * static_cast<size_t>(columns - i));
    const Reflection to = reflect(next, i);
    couplings[i - 1] = to.image * to.image;
    memset(p, 0, sizeof(double) * static_cast<size_t>(columns));
    int64_t j = 0;
    for (; j + kSweepRows <= i; j += kSweepRows) sweep<kSweepRows>(a, stride, j, columns, v, w, next, p);
    for (; j < i; ++j) sweep<1>(a, stride, j, columns, v, w, next, p);
    // Columns from i on are done with and hold what nobody needs.
    memset(p + i, 0, sizeof(double) * static_cast<size_t>(columns - i));
    const double share = dot(next, p, columns) * to.inverse * to.inverse * 0.5;
    for (int64_t c = 0; c < columns; ++c) p[c] = p[c] * to.inverse - share * next[c];
    double *const old_v = v, *const old_w = w;
    v = next, w = p, next = old_v, p = old_w;
  }
}

// The eigenvalues in place of the diagonal; couplings are squares, those up to `negligible` count as 0. False where an
// eigenvalue takes more than kQlSweeps sweeps.
bool ql(double* diagonal, double* couplings, int64_t n, double negligible) {
  for (int64_t top = 0; top < n; ++top)
    for (int sweeps = 0;; ++sweeps) {
      int64_t bottom = top;
      while (bottom < n - 1 && couplings[bottom] > negligible) ++bottom;
      if (bottom == top) break;
      if (sweeps == kQlSweeps) return false;
      // Of the eigenvalues of the upper 2 x 2 block the one nearer to its first entry.
      const double coupling = __builtin_sqrt(couplings[top]);
      const double t = (diagonal[top + 1] - diagonal[top]) / (2.0 * coupling), root = __builtin_sqrt(t * t + 1.0);
      const double shift = diagonal[top] - coupling / (t + (t < 0 ? -root : root));
      double cosine = 1.0, sine = 0.0, gamma = diagonal[bottom] - shift, square = gamma * gamma;
      for (int64_t i = bottom - 1; i >= top; --i) {
        const double beside = couplings[i], total = square + beside, before = gamma, last_cosine = cosine;
        if (i < bottom - 1) couplings[i + 1] = sine * total;
        cosine = square / total;
        sine = beside / total;
        gamma = cosine * (diagonal[i] - shift) - sine * before;
        diagonal[i + 1] = before + (diagonal[i] - gamma);
        // gamma^2 / cosine, whose limit for cosine -> 0 is the other; total / square does not wait for gamma.
        square = square > kTiny ? gamma * gamma * (total / square) : last_cosine * beside;
      }
      couplings[top] = sine * square;
      diagonal[top] = shift + gamma;
    }
  return true;
}

}  // namespace
