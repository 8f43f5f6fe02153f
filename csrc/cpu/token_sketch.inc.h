// out [B, K] += K^-1/2 sum_t (H S_V onehot(id_t)) * (H S e_t); ids [T], e [T, d].
// Column c of H times H y is H (y with its index XOR c), and H is linear: rows add up before one transform a sample.

namespace {

// sum[index ^ bucket] += sign * (S x)[index].
template <typename T>
GV_INLINE void add_shifted(float* sum, const T* x, const TableView& s, int bucket, float sign) {
  // XOR of a destination's low bits moves lanes within a run: lane l of the result is lane l ^ bucket.
  uint32_t shift[kRun];
  for (int l = 0; l < kRun; ++l) shift[l] = static_cast<uint32_t>(l ^ (bucket & (kRun - 1)));
  const uint32_t run = static_cast<uint32_t>(bucket - bucket % kRun);
  for (int64_t j = 0; j < s.wide; j += kRun) {
    const Move& to = s.targets[j / kRun];
    const F moved = permute(load_permuted(x + j, to.mask, to.lanes), shift) * all(sign);
    float* into = sum + (to.offset ^ run);
    store(into, load(into) + moved);
  }
  for (int64_t j = s.wide; j < s.width; ++j)
    sum[s.bucket[j] ^ bucket] += scalar(x + j) * (static_cast<float>(s.sign[j]) * sign);
}

void token_sketch(const int64_t* ids, const TableView& id_table, const Rows& e, const Chunks& chunks, int K,
                  float* partial, float* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      float* sum = partial + chunk * K;
      memset(sum, 0, sizeof(float) * static_cast<size_t>(K));
      for (int64_t t = chunks.begin[chunk]; t < chunks.end[chunk]; ++t) {
        const int bucket = id_table.bucket[ids[t]];
        const float sign = id_table.sign[ids[t]];
        if (e.bf16)
          add_shifted(sum, row_of<Bf16>(e, t), *e.table, bucket, sign);
        else
          add_shifted(sum, row_of<float>(e, t), *e.table, bucket, sign);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < chunks.samples; ++b)
      if (chunks.first[b] < chunks.first[b + 1]) {
        float* sum = partial + chunks.first[b] * K;
        reduce_chunks(partial, chunks.first[b], chunks.first[b + 1], K);
        transform(sum, K);
        add_scaled(out + b * K, sum, inverse_sqrt(K), K);
      }
  }
}

}  // namespace
