// Distances between two batches of unit embeddings (rows, d), f32 (Huber et al., FG 2021, eq. 4): a number per row,
// then `distill_finish` adds the rows in a fixed order. And class centres that a teacher's embeddings pull
// (AdaDistill, Boutros et al., ECCV 2024).
#include "common.cuh"

// Distance of a row and its derivative, of the squared length q of the difference of two unit vectors of length d.
struct Distance {
    float value, slope;
};

// Values of `kind`.
constexpr int MSE = 0;
constexpr int COSINE = 1;

__device__ inline Distance distance_of(int kind, float q, int d) {
    if (kind == MSE) return {q / d, 1.f / d};
    if (kind == COSINE) return {q / 2.f, 0.5f};
    // The squared angle: |s - t| = 2 sin(theta / 2).
    const float half = fminf(sqrtf(q) / 2.f, 1.f);
    const float theta = 2.f * asinf(half);
    const float slope = half > 1e-8f ? theta / (2.f * half * fmaxf(sqrtf(1.f - half * half), 1e-3f)) : 1.f;
    return {theta * theta, slope};
}

// The distance of each row of s and t, times the row's weight if `row_weights` is not null, and `factor` times its
// gradient with respect to s. A warp per row. Bytes per element: 12; the second read comes from the cache.
KERNEL(distill_rows)
(const float* s, const float* t, i64 rows, int d, int kind, const float* row_weights, float factor, float* gradient,
 float* distances) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float sum = 0.f;
    for (int i = lane * 4; i < d; i += WARP * 4) {
        const Pack<float> own = load(s + row * d + i), other = load(t + row * d + i);
#pragma unroll
        for (int k = 0; k < 4; k++) sum += (own.at[k] - other.at[k]) * (own.at[k] - other.at[k]);
    }
    const Distance of_row = distance_of(kind, warp_sum(sum), d);
    const float weight = row_weights ? row_weights[row] : 1.f;
    if (lane == 0) distances[row] = weight * of_row.value;
    const float scale = 2.f * factor * weight * of_row.slope;
    for (int i = lane * 4; i < d; i += WARP * 4) {
        Pack<float> pack = load(s + row * d + i);
        const Pack<float> other = load(t + row * d + i);
#pragma unroll
        for (int k = 0; k < 4; k++) pack.at[k] = scale * (pack.at[k] - other.at[k]);
        store(gradient + row * d + i, pack);
    }
}
EXPORT(distill_rows)

// Squared norm of each row of x (rows, c). A warp per row. Bytes per element: 4.
KERNEL(distill_squares)(const float* x, i64 rows, int c, float* squares) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float sum = 0.f;
    for (int i = lane; i < c; i += WARP) sum += x[row * c + i] * x[row * c + i];
    sum = warp_sum(sum);
    if (lane == 0) squares[row] = sum;
}
EXPORT(distill_squares)

// distance = scale * the sum of `squares` (n). One block.
KERNEL(distill_finish)(const float* squares, int n, float scale, float* distance) {
    DYNAMIC_SHARED(float, shared);
    float sum = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += squares[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *distance = scale * sum;
}
EXPORT(distill_finish)

// Pulls class centres (classes, d) towards the teacher's unit rows: with the centre w scaled to unit length,
// a = clamp((s . t) (w . t), 1e-6, 1), w = a w + (1 - a) t. Class `classes[i]` has the rows `order[starts[i]]` to
// `order[starts[i + 1] - 1]`, which follow each other. A warp per class that occurs. Bytes per element of a row: 20.
KERNEL(distill_pull)
(const float* s, const float* t, int d, const i64* classes, const int* starts, const int* order, int num, float* centres) {
    const int i = int((i64(blockIdx.x) * blockDim.x + threadIdx.x) / WARP);
    const int lane = threadIdx.x % WARP;
    if (i >= num) return;
    float* centre = centres + classes[i] * d;
    for (int place = starts[i]; place < starts[i + 1]; place++) {
        const float *own = s + i64(order[place]) * d, *target = t + i64(order[place]) * d;
        float with_student = 0.f, with_centre = 0.f, squares = 0.f;
        for (int j = lane * 4; j < d; j += WARP * 4) {
            const Pack<float> a = load(own + j), b = load(target + j), w = load(centre + j);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                with_student += a.at[k] * b.at[k];
                with_centre += w.at[k] * b.at[k];
                squares += w.at[k] * w.at[k];
            }
        }
        const float inv_norm = 1.f / sqrtf(warp_sum(squares) + 1e-24f);
        const float product = warp_sum(with_student) * warp_sum(with_centre) * inv_norm;
        // Embeddings that are not finite must not spoil the centre.
        if (product != product) continue;
        const float share = fminf(fmaxf(product, 1e-6f), 1.f);
        for (int j = lane * 4; j < d; j += WARP * 4) {
            Pack<float> w = load(centre + j);
            const Pack<float> b = load(target + j);
#pragma unroll
            for (int k = 0; k < 4; k++) w.at[k] = share * inv_norm * w.at[k] + (1.f - share) * b.at[k];
            // A lane reads and writes its own elements.
            store(centre + j, w);
        }
    }
}
EXPORT(distill_pull)
