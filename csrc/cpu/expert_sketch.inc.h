// out [B, K] += K^-1/2 sum_r (H S_o^x e_r) * (H S_i^x a_r), x the expert of row r; a [R, I], or none: 1; e [R, O].
// A chunk is of one sample and passes from expert to expert, so that there are as many partial rows, and as many
// chunks to add, as without experts; only the tables change within it.

namespace {

GV_INLINE Rows of_expert(const ExpertRows& x, int64_t expert) {
  return {x.data, x.stride, x.bf16, x.tables + expert};
}

void expert_chunk(const ExpertRows& a, const ExpertRows& e, const Routing& routing, int64_t begin, int64_t end, int K,
                  float* left, float* right, float* sum) {
  memset(sum, 0, sizeof(float) * static_cast<size_t>(K));
  for (int64_t at = begin; at < end; ++at) {
    const int64_t row = routing.order[at], expert = routing.expert[row];
    const Rows inputs = of_expert(a, expert), part = of_expert(e, expert);
    if (at + 1 < end) {
      prefetch_row(inputs, routing.order[at + 1], K);
      prefetch_row(part, routing.order[at + 1], K);
    }
    sketch_row(inputs, &part, 1, row, K, left, right, sum);
  }
}

// Without a factor the folds of all rows add up before one transform a sample.
void expert_bias_chunk(const ExpertRows& e, const Routing& routing, int64_t begin, int64_t end, int K, float* sum) {
  memset(sum, 0, sizeof(float) * static_cast<size_t>(K));
  for (int64_t at = begin; at < end; ++at) {
    const int64_t row = routing.order[at];
    const Rows part = of_expert(e, routing.expert[row]);
    if (e.bf16)
      add_shifted(sum, row_of<Bf16>(part, row), *part.table, 0, 1.0f);
    else
      add_shifted(sum, row_of<float>(part, row), *part.table, 0, 1.0f);
  }
}

void expert_sketch(const ExpertRows* a, const ExpertRows& e, const Routing& routing, const Chunks& chunks, int K,
                   float* partial, float* buffers, float* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* left = buffers + thread_number() * 2 * static_cast<int64_t>(K + kPad);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      float* sum = partial + chunk * K;
      if (a == nullptr)
        expert_bias_chunk(e, routing, chunks.begin[chunk], chunks.end[chunk], K, sum);
      else
        expert_chunk(*a, e, routing, chunks.begin[chunk], chunks.end[chunk], K, left, left + K + kPad, sum);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < chunks.samples; ++b)
      if (chunks.first[b] < chunks.first[b + 1]) {
        float* sum = partial + chunks.first[b] * K;
        reduce_chunks(partial, chunks.first[b], chunks.first[b + 1], K);
        if (a == nullptr) transform(sum, K);
        add_scaled(out + b * K, sum, inverse_sqrt(K), K);
      }
  }
}

}  // namespace
