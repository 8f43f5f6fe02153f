// One register of doubles, from and to memory of any alignment.

namespace {

GV_INLINE Doubles load_doubles(const double* p) {
  Doubles x;
  memcpy(&x, p, sizeof x);
  return x;
}
GV_INLINE void store_doubles(double* p, Doubles x) { memcpy(p, &x, sizeof x); }
GV_INLINE Doubles all_doubles(double x) { return x - Doubles{}; }

}  // namespace
