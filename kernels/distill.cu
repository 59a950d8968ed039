// Distances between two batches of unit embeddings (rows, d), f32 (Huber et al., FG 2021, eq. 4): a sum of squares per
// row, then `distill_finish` adds the rows in a fixed order.
#include "common.cuh"

// u = factor * (s - t), and the squared norm of each row of s - t. A warp per row. Bytes per element: 12.
KERNEL(distill_difference)(const float* s, const float* t, i64 rows, int d, float factor, float* u, float* squares) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float sum = 0.f;
    for (int i = lane * 4; i < d; i += WARP * 4) {
        Pack<float> pack = load(s + row * d + i);
        const Pack<float> other = load(t + row * d + i);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float difference = pack.at[k] - other.at[k];
            sum += difference * difference;
            pack.at[k] = factor * difference;
        }
        store(u + row * d + i, pack);
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[row] = sum;
}
EXPORT(distill_difference)

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
