// Batch norm with PReLU over activations of `rows` pixels by `c` channels, channels last (Ioffe and Szegedy, ICML 2015;
// He et al., ICCV 2015):
//
//     z = x * scale + shift,   scale = weight / sqrt(var + eps),   shift = bias - mean * scale
//     y = z > 0 ? z : slope * z
//
// An activation is stored before its norm; `*_apply_*` writes the norm's output. c is a multiple of the elements per
// access (4 in f32, 8 in bf16 and f16). A thread owns the channels of one access and walks down the rows, so a block
// reads contiguous rows. Sums take two stages, both in an order that depends only on the sizes: a block per chunk of
// rows, then a warp per channel over the chunks.
#include "common.cuh"

// Mean, sum of squared deviations from it, and number of values (Chan, Golub and LeVeque, 1983, eq. 2.1).
struct Moments {
    float mean, m2, n;
};

__device__ inline Moments join(Moments a, Moments b) {
    const float n = a.n + b.n;
    if (b.n == 0.f) return a;
    const float delta = b.mean - a.mean, share = b.n / n;
    return {a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.n * share, n};
}

// Moments of the channels of each chunk of `chunk` rows: `means` and `m2s` are (chunks, c). Reads each element once.
// A thread sums deviations from its first value, which keeps precision when the mean is large.
// Grid: chunks. Shared: 2 * lines * c floats.
template <class T>
__device__ void stats_of_chunk(const T* x, i64 rows, int c, i64 chunk, float* means, float* m2s) {
    DYNAMIC_SHARED(float, shared);
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    const i64 begin = blockIdx.x * chunk, end = begin + chunk < rows ? begin + chunk : rows;
    float* shared_m2 = shared + share.lines * c;
    if (share.works() && begin + share.line < end) {
        const T* at = x + share.group * N;
        const Pack<T> first = load(at + (begin + share.line) * c);
        float sum[N] = {}, square[N] = {};
        float n = 1.f;
        for (i64 row = begin + share.line + share.lines; row < end; row += share.lines) {
            const Pack<T> pack = load(at + row * c);
            n += 1.f;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float d = pack.at[i] - first.at[i];
                sum[i] += d;
                square[i] += d * d;
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int place = share.line * c + share.group * N + i;
            shared[place] = first.at[i] + sum[i] / n;
            shared_m2[place] = square[i] - sum[i] * sum[i] / n;
        }
    }
    __syncthreads();
    for (int channel = threadIdx.x; channel < c; channel += blockDim.x) {
        Moments all = {0.f, 0.f, 0.f};
        for (int line = 0; line < share.lines && begin + line < end; line++) {
            const float n = float((end - begin - line + share.lines - 1) / share.lines);
            all = join(all, {shared[line * c + channel], shared_m2[line * c + channel], n});
        }
        means[blockIdx.x * c + channel] = all.mean;
        m2s[blockIdx.x * c + channel] = all.m2;
    }
}

#define STATS(T)                                                                                                 \
    KERNEL(batch_norm_stats_##T)(const T* x, i64 rows, int c, i64 chunk, float* means, float* m2s) {             \
        stats_of_chunk(x, rows, c, chunk, means, m2s);                                                           \
    } \
    EXPORT(batch_norm_stats_##T)
STATS(f32)
STATS(bf16)
STATS(f16)

// Constants of a norm for `apply` and the backward pass: four contiguous arrays of c floats.
struct Constants {
    float *scale, *shift, *mean, *inv_std;
    __device__ Constants(float* all, int c) : scale(all), shift(all + c), mean(all + 2 * c), inv_std(all + 3 * c) {}
};

__device__ inline void write_constants(float* all, int c, int channel, float mean, float var, float eps, float weight, float bias) {
    const Constants constants(all, c);
    const float inv_std = 1.f / sqrtf(var + eps);
    constants.scale[channel] = weight * inv_std;
    constants.shift[channel] = bias - mean * weight * inv_std;
    constants.mean[channel] = mean;
    constants.inv_std[channel] = inv_std;
}

// Moments of a channel over chunks of `chunk` rows, the last of which may be shorter; the means and sums of a chunk are
// `stride` floats after those of the chunk before. A warp per channel: for its first lane.
__device__ inline Moments moments_of_chunks(const float* means, const float* m2s, int stride, i64 rows, i64 chunk, int channel) {
    const int lane = threadIdx.x % WARP;
    Moments all = {0.f, 0.f, 0.f};
    for (i64 i = lane; i * chunk < rows; i += WARP) {
        const i64 rest = rows - i * chunk;
        all = join(all, {means[i * stride + channel], m2s[i * stride + channel], float(rest < chunk ? rest : chunk)});
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const Moments other = {__shfl_down_sync(0xffffffffu, all.mean, offset), __shfl_down_sync(0xffffffffu, all.m2, offset),
                               __shfl_down_sync(0xffffffffu, all.n, offset)};
        if (lane < offset) all = join(all, other);
    }
    return all;
}

// Joins the chunks of this rank for the statistics of all ranks: `joined` (2, c) has means and sums. A warp per
// channel. Grid: c divided by the warps per block, rounded up.
KERNEL(batch_norm_join)(const float* means, const float* m2s, i64 rows, int c, i64 chunk, float* joined) {
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (channel >= c) return;
    const Moments all = moments_of_chunks(means, m2s, c, rows, chunk, channel);
    if (threadIdx.x % WARP > 0) return;
    joined[channel] = all.mean;
    joined[c + channel] = all.m2;
}
EXPORT(batch_norm_join)

// Joins the chunks; writes the constants (4, c) and updates the running statistics with `momentum` and the unbiased
// variance, as PyTorch's BatchNorm2d; with one row the running variance does not change. `stride` as above: c for the
// chunks of a rank, 2 c for what the ranks have joined. A warp per channel. Grid: c divided by the warps per block,
// rounded up.
KERNEL(batch_norm_finish)
(const float* means, const float* m2s, int stride, i64 rows, int c, i64 chunk, const float* weight, const float* bias, float eps,
 float momentum, float* running_mean, float* running_var, float* constants) {
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (channel >= c) return;
    const Moments all = moments_of_chunks(means, m2s, stride, rows, chunk, channel);
    if (threadIdx.x % WARP > 0) return;
    write_constants(constants, c, channel, all.mean, all.m2 / float(rows), eps, weight[channel], bias[channel]);
    running_mean[channel] += momentum * (all.mean - running_mean[channel]);
    if (rows > 1) running_var[channel] += momentum * (all.m2 / float(rows - 1) - running_var[channel]);
}
EXPORT(batch_norm_finish)

// Constants of a norm by its running statistics. A thread per channel.
KERNEL(batch_norm_frozen)
(const float* running_mean, const float* running_var, int c, const float* weight, const float* bias, float eps, float* constants) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= c) return;
    write_constants(constants, c, channel, running_mean[channel], running_var[channel], eps, weight[channel], bias[channel]);
}
EXPORT(batch_norm_frozen)

// y = a through its norm, plus b through its own norm if b is not null. y may be a or b. Bytes per element: the size of
// T, times 2 without b and 3 with it. Grid: any; a thread keeps its channels.
template <class T>
__device__ void apply(const T* a, const float* a_constants, const float* a_slopes, const T* b, const float* b_constants,
                      const float* b_slopes, i64 rows, int c, T* y) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    const Seen<N> seen_a(a_constants, a_slopes, c, channel), seen_b(b_constants, b_slopes, c, channel);
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        const i64 place = row * c + channel;
        Pack<T> pack = load(a + place);
#pragma unroll
        for (int i = 0; i < N; i++) pack.at[i] = seen_a(pack.at[i], i);
        if (b) {
            const Pack<T> other = load(b + place);
#pragma unroll
            for (int i = 0; i < N; i++) pack.at[i] += seen_b(other.at[i], i);
        }
        store(y + place, pack);
    }
}

#define APPLY(T)                                                                                                       \
    KERNEL(batch_norm_apply_##T)                                                                                       \
    (const T* a, const float* a_constants, const float* a_slopes, const T* b, const float* b_constants,                \
     const float* b_slopes, i64 rows, int c, T* y) {                                                                   \
        apply(a, a_constants, a_slopes, b, b_constants, b_slopes, rows, c, y);                                         \
    } \
    EXPORT(batch_norm_apply_##T)
APPLY(f32)
APPLY(bf16)
APPLY(f16)

// Sums over each chunk of rows for the gradients of a norm and its PReLU, from gy, the gradient of y. With gz = gy
// where z > 0, else slope * gy, `sums` (chunks, 3, c) has the sums of gz, of gz * (x - mean) / std, and of gy * z where
// z <= 0. Reads x and gy once. Grid: chunks. Shared: 3 * lines * c floats.
template <class T>
__device__ void sums_of_chunk(const T* x, const T* gy, i64 rows, int c, i64 chunk, const float* constants, const float* slopes, float* sums) {
    DYNAMIC_SHARED(float, shared);
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    const i64 begin = blockIdx.x * chunk, end = begin + chunk < rows ? begin + chunk : rows;
    if (share.works()) {
        const int channel = share.group * N;
        const Seen<N> seen(constants, slopes, c, channel);
        float mean[N], inv_std[N], of_z[N] = {}, of_x[N] = {}, of_slope[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            mean[i] = constants[2 * c + channel + i];
            inv_std[i] = constants[3 * c + channel + i];
        }
        for (i64 row = begin + share.line; row < end; row += share.lines) {
            const Pack<T> px = load(x + row * c + channel), pg = load(gy + row * c + channel);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float z = px.at[i] * seen.scale[i] + seen.shift[i];
                const float gz = z > 0.f ? pg.at[i] : seen.slope[i] * pg.at[i];
                of_z[i] += gz;
                of_x[i] += gz * (px.at[i] - mean[i]) * inv_std[i];
                of_slope[i] += z > 0.f ? 0.f : pg.at[i] * z;
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            float* at = shared + share.line * 3 * c + channel + i;
            at[0] = of_z[i];
            at[c] = of_x[i];
            at[2 * c] = of_slope[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * c; i += blockDim.x) {
        float sum = 0.f;
        for (int line = 0; line < share.lines; line++) sum += shared[line * 3 * c + i];
        sums[i64(blockIdx.x) * 3 * c + i] = sum;
    }
}

#define SUMS(T)                                                                                                        \
    KERNEL(batch_norm_sums_##T)                                                                                        \
    (const T* x, const T* gy, i64 rows, int c, i64 chunk, const float* constants, const float* slopes, float* sums) {  \
        sums_of_chunk(x, gy, rows, c, chunk, constants, slopes, sums);                                                 \
    } \
    EXPORT(batch_norm_sums_##T)
SUMS(f32)
SUMS(bf16)
SUMS(f16)

// Joins the chunks: writes the gradients of bias, weight and slopes, each of which may be null, and `means` (2, c), the
// first two sums divided by `rows`, for `batch_norm_grad_*`. A warp per channel.
KERNEL(batch_norm_finish_sums)
(const float* sums, int chunks, i64 rows, int c, float* g_bias, float* g_weight, float* g_slopes, float* means) {
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (channel >= c) return;
    float of[3] = {};
    for (int i = lane; i < chunks; i += WARP) {
#pragma unroll
        for (int k = 0; k < 3; k++) of[k] += sums[(i64(i) * 3 + k) * c + channel];
    }
#pragma unroll
    for (int k = 0; k < 3; k++) of[k] = warp_sum(of[k]);
    if (lane > 0) return;
    if (g_bias) g_bias[channel] = of[0];
    if (g_weight) g_weight[channel] = of[1];
    if (g_slopes) g_slopes[channel] = of[2];
    means[channel] = of[0] / float(rows);
    means[c + channel] = of[1] / float(rows);
}
EXPORT(batch_norm_finish_sums)

// Gradient of x from that of y, plus `direct`, the gradient that reaches x by other paths, if it is not null. With
// batch statistics
//
//     gx = scale * (gz - mean(gz) - x_hat * mean(gz * x_hat)),   x_hat = (x - mean) / std
//
// and with frozen ones (`means` is null) gx = scale * gz. gx may be x, gy or direct.
// Bytes per element: the size of T, times 3 without `direct` and 4 with it. Grid: any.
template <class T>
__device__ void grad(const T* x, const T* gy, const T* direct, i64 rows, int c, const float* constants, const float* slopes,
                     const float* means, T* gx) {
    constexpr int N = PER_ACCESS<T>;
    const Share<T> share(c);
    if (!share.works()) return;
    const int channel = share.group * N;
    const Seen<N> seen(constants, slopes, c, channel);
    // gx = scale * gz - by_x * (x - mean) - rest
    float mean[N], by_x[N], rest[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        mean[i] = constants[2 * c + channel + i];
        by_x[i] = means ? seen.scale[i] * constants[3 * c + channel + i] * means[c + channel + i] : 0.f;
        rest[i] = means ? seen.scale[i] * means[channel + i] : 0.f;
    }
    for (i64 row = i64(blockIdx.x) * share.lines + share.line; row < rows; row += i64(gridDim.x) * share.lines) {
        const i64 place = row * c + channel;
        const Pack<T> px = load(x + place);
        Pack<T> pack = load(gy + place);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float z = px.at[i] * seen.scale[i] + seen.shift[i];
            const float gz = z > 0.f ? pack.at[i] : seen.slope[i] * pack.at[i];
            pack.at[i] = seen.scale[i] * gz - by_x[i] * (px.at[i] - mean[i]) - rest[i];
        }
        if (direct) {
            const Pack<T> other = load(direct + place);
#pragma unroll
            for (int i = 0; i < N; i++) pack.at[i] += other.at[i];
        }
        store(gx + place, pack);
    }
}

#define GRAD(T)                                                                                                         \
    KERNEL(batch_norm_grad_##T)                                                                                         \
    (const T* x, const T* gy, const T* direct, i64 rows, int c, const float* constants, const float* slopes,            \
     const float* means, T* gx) {                                                                                       \
        grad(x, gy, direct, rows, c, constants, slopes, means, gx);                                                     \
    } \
    EXPORT(batch_norm_grad_##T)
GRAD(f32)
GRAD(bf16)
GRAD(f16)
