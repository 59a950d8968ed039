// Margin softmax (ArcFace, Deng et al., CVPR 2019, eq. 3; CosFace, Wang et al., CVPR 2018, eq. 4; ElasticFace, Boutros
// et al., CVPRW 2022, eq. 4 and 5) in blocks of classes: the matrix of rows by all classes is never stored.
//
// With unit rows e_n (embeddings) and w_j (class centres) and c_nj = e_n . w_j, row n of target t has
//
//     loss_n = log(exp(l_n) + sum_{j != t} exp(s c_nj)) - l_n,   l_n = s cos(acos(c_nt) + m_n)  or  s (c_nt - m_n)
//
// Forward, for each block of classes: `unit_rows` of the centres, a matrix product for the block's cosines, and
// `softmax`, which leaves a maximum and a sum per row. Then `rows` joins the blocks and adds the margins. Backward, for
// each block: the cosines again, `gradient_*`, which turns them into the gradient g with respect to the cosines, two
// matrix products with g, and `through_unit_rows` for the centres; at the end `through_unit_rows` for the embeddings.
// Cosines are f32 and a block stays in the second-level cache; the products' inputs (T) may have 16 bits.
//
// g omits the common factor s * weight / rows, which the products apply. Without it g is small enough for 16 bits.
#include "common.cuh"

// Added to a squared norm, so that a zero row stays zero instead of becoming NaN.
constexpr float EPS = 1e-24f;
// Lower bound of the sin(theta) that the gradient divides by.
constexpr float MIN_SIN = 1e-3f;
constexpr float LOG2_E = 1.44269504088896341f;

// Values of `form` and `gradient`.
constexpr int ANGULAR = 0;
constexpr int TRUE_GRADIENT = 0;
// Values of `matching`.
constexpr int RANKED = 1;

// Rows of x (rows, d), f32, scaled to unit length, and the inverses of their norms. d is a multiple of 8. A warp per
// row. Bytes per element: 4 + the size of T; the second read of x comes from the cache.
template <class T>
__device__ void unit_rows(const float* x, i64 rows, int d, T* unit, float* inv_norms) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float* from = x + row * d;
    float sum = 0.f;
    for (int i = lane * 4; i < d; i += WARP * 4) {
        const Pack<float> pack = load(from + i);
#pragma unroll
        for (int k = 0; k < 4; k++) sum += pack.at[k] * pack.at[k];
    }
    const float inv_norm = 1.f / sqrtf(warp_sum(sum) + EPS);
    if (lane == 0) inv_norms[row] = inv_norm;
    constexpr int N = PER_ACCESS<T>;
    for (int i = lane * N; i < d; i += WARP * N) {
        Pack<T> pack;
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            const Pack<float> part = load(from + i + k);
#pragma unroll
            for (int l = 0; l < 4; l++) pack.at[k + l] = part.at[l] * inv_norm;
        }
        store(unit + row * d + i, pack);
    }
}

#define UNIT_ROWS(T)                                                                          \
    KERNEL(margin_unit_rows_##T)(const float* x, i64 rows, int d, T* unit, float* inv_norms) { \
        unit_rows(x, rows, d, unit, inv_norms);                                               \
    } \
    EXPORT(margin_unit_rows_##T)
UNIT_ROWS(f32)
UNIT_ROWS(bf16)
UNIT_ROWS(f16)

// Clamps to [-1, 1]; NaN passes, so that a diverged network is noticed.
__device__ inline float clamped(float c) { return c > 1.f ? 1.f : c < -1.f ? -1.f : c; }

// Maximum of some logits, and the sum of exp(logit - maximum). A NaN among the logits makes the sum NaN.
struct Softmax {
    float max, sum;
};

__device__ inline Softmax nothing() { return {-INFINITY, 0.f}; }

__device__ inline Softmax join(Softmax a, Softmax b) {
    const float max = b.max > a.max ? b.max : a.max;
    // If both are empty, the difference of infinities would be NaN.
    if (max == -INFINITY) return {max, a.sum + b.sum};
    return {max, a.sum * exp2f((a.max - max) * LOG2_E) + b.sum * exp2f((b.max - max) * LOG2_E)};
}

// Maximum and sum of each row of a block of cosines (n, stride), whose first `num` columns are the classes from `first`
// on. The row's target is excluded; its cosine is written to `targets`. `parts` is (n). `labels` are class numbers, or
// -1 for a row that does not count. A block per row: grid n. Reads 4 bytes per cosine. `stride` is a multiple of 4.
KERNEL(margin_softmax)
(const float* cosines, int stride, i64 first, int num, const i64* labels, float scale, float2* parts, float* targets) {
    DYNAMIC_SHARED(Softmax, shared);
    const i64 row = blockIdx.x;
    const i64 label = labels[row] < 0 ? -1 : labels[row] - first;
    Softmax all = nothing();
    if (labels[row] >= 0) {
        for (int j = threadIdx.x * 4; j < num; j += blockDim.x * 4) {
            const Pack<float> pack = load(cosines + row * stride + j);
            float logits[4];
            Softmax part = nothing();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const bool counts = j + k < num && j + k != label;
                logits[k] = counts ? clamped(pack.at[k]) * scale : -INFINITY;
                if (logits[k] > part.max) part.max = logits[k];
                if (j + k == label) targets[row] = pack.at[k];
            }
            const float base = part.max == -INFINITY ? 0.f : part.max;
#pragma unroll
            for (int k = 0; k < 4; k++) part.sum += exp2f((logits[k] - base) * LOG2_E);
            all = join(all, part);
        }
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const Softmax other = {__shfl_xor_sync(0xffffffffu, all.max, offset), __shfl_xor_sync(0xffffffffu, all.sum, offset)};
        // The lower lane is always first, so that both lanes get the same bits.
        all = threadIdx.x & offset ? join(other, all) : join(all, other);
    }
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = all;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < int(blockDim.x) / WARP; w++) all = join(all, shared[w]);
    parts[row] = make_float2(all.max, all.sum);
}
EXPORT(margin_softmax)

// Joins the parts (blocks, n) of each row to one, `joined` (n). A thread per row.
KERNEL(margin_join)(const float2* parts, int blocks, int n, float2* joined) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n) return;
    Softmax all = nothing();
    for (int i = 0; i < blocks; i++) {
        const float2 part = parts[i64(i) * n + row];
        all = join(all, {part.x, part.y});
    }
    joined[row] = make_float2(all.max, all.sum);
}
EXPORT(margin_join)

// Values of a row for `gradient_*`.
struct Row {
    float max;      // largest logit
    float inv_sum;  // inverse of the sum of exp(logit - max); 0 for a row without a label
    float target;   // gradient with respect to the target's cosine
    float unused;
};

// Joins the parts (blocks, n) of each row, applies its margin, and writes `rows` and the mean loss over `counted` rows.
//
// `margins` (n) has one margin per row. If `matching` is not 0 (the "+" losses), it has those of the `counted` labelled
// rows in ascending order, to be assigned by the target cosines. RANKED: the smaller the cosine, the larger the margin.
// REFERENCE: as in the published code, which uses the sorting permutation in place of its inverse. `positions` numbers
// the labelled rows; `order` is scratch space for n numbers. One block.
KERNEL(margin_rows)
(const float2* parts, int blocks, int n, int counted, const i64* labels, const float* targets, const float* margins, const int* positions,
 int matching, int* order, int form, int gradient, float scale, Row* rows, float* losses, float* loss) {
    DYNAMIC_SHARED(float, shared);
    if (matching != 0) {
        for (int row = threadIdx.x; row < n; row += blockDim.x) {
            if (labels[row] < 0) continue;
            const float own = clamped(targets[row]);
            int rank = 0;
            for (int i = 0; i < n; i++) {
                if (labels[i] < 0) continue;
                const float other = clamped(targets[i]);
                rank += other > own || (other == own && i < row) ? 1 : 0;
            }
            // With NaN cosines some ranks may not occur.
            if (matching == RANKED) order[positions[row]] = rank;
            else order[rank] = positions[row];
        }
        __syncthreads();
    }
    float sum = 0.f;
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
        if (labels[row] < 0) {
            rows[row] = {0.f, 0.f, 0.f, 0.f};
            losses[row] = 0.f;
            continue;
        }
        Softmax all = nothing();
        for (int i = 0; i < blocks; i++) {
            const float2 part = parts[i64(i) * n + row];
            all = join(all, {part.x, part.y});
        }
        const float margin = matching != 0 ? margins[order[positions[row]]] : margins[row];
        const float raw = targets[row], c = clamped(raw);
        const float sin = sqrtf(fmaxf(1.f - c * c, 0.f));
        float value = c - margin, slope = 1.f;
        if (form == ANGULAR) {
            value = cosf(acosf(c) + margin);
            if (gradient == TRUE_GRADIENT) slope = cosf(margin) + c / fmaxf(sin, MIN_SIN) * sinf(margin);
        }
        if (raw != c) slope = 0.f;
        const float logit = value * scale;
        all = join(all, {logit, logit == logit ? 1.f : logit});
        const float p = exp2f((logit - all.max) * LOG2_E) / all.sum;
        rows[row] = {all.max, 1.f / all.sum, (p - 1.f) * slope, 0.f};
        losses[row] = all.max + logf(all.sum) - logit;
        sum += losses[row];
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *loss = counted > 0 ? sum / float(counted) : 0.f;
}
EXPORT(margin_rows)

// Gradient g (n, stride) with respect to the cosines (n, stride) of a block of classes, 0 from column `num` on, and the
// sums of g * cosine over each chunk of `chunk` rows, `sums` (chunks, stride). A warp owns 128 columns; the warps of a
// block share the rows. Grid: stride / 128 rounded up, chunks. Shared: warps * 128 floats. Bytes per cosine: 4 + the
// size of T.
template <class T>
__device__ void gradient_of_block(const float* cosines, int stride, i64 first, int num, int n, int chunk, const i64* labels,
                                  const Row* rows, float scale, T* g, float* sums) {
    DYNAMIC_SHARED(float, shared);
    constexpr int COLUMNS = 4 * WARP;
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    const int j = blockIdx.x * COLUMNS + lane * 4;
    const int begin = blockIdx.y * chunk, end = begin + chunk < n ? begin + chunk : n;
    float of_column[4] = {};
    if (j < stride) {
        for (int row = begin + warp; row < end; row += warps) {
            const Row of = rows[row];
            const i64 label = labels[row] < 0 ? -1 : labels[row] - first;
            const Pack<float> pack = load(cosines + i64(row) * stride + j);
            T out[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float c = pack.at[k], inside = clamped(c);
                float value = 0.f;
                if (j + k < num && labels[row] >= 0) {
                    value = c == inside ? exp2f((inside * scale - of.max) * LOG2_E) * of.inv_sum : 0.f;
                    if (j + k == label) value = of.target;
                    of_column[k] += value * c;
                }
                out[k] = from_f32<T>(value);
            }
            // Four elements: 16 bytes in f32, 8 in a 16-bit type.
            if constexpr (sizeof(T) == 4) *reinterpret_cast<uint4*>(g + i64(row) * stride + j) = *reinterpret_cast<const uint4*>(out);
            else *reinterpret_cast<uint2*>(g + i64(row) * stride + j) = *reinterpret_cast<const uint2*>(out);
        }
    }
#pragma unroll
    for (int k = 0; k < 4; k++) shared[warp * COLUMNS + lane * 4 + k] = of_column[k];
    __syncthreads();
    for (int i = threadIdx.x; i < COLUMNS; i += blockDim.x) {
        const int column = blockIdx.x * COLUMNS + i;
        if (column >= stride) break;
        float sum = 0.f;
        for (int w = 0; w < warps; w++) sum += shared[w * COLUMNS + i];
        sums[i64(blockIdx.y) * stride + column] = sum;
    }
}

#define GRADIENT(T)                                                                                                       \
    KERNEL(margin_gradient_##T)                                                                                           \
    (const float* cosines, int stride, i64 first, int num, int n, int chunk, const i64* labels, const Row* rows,          \
     float scale, T* g, float* sums) {                                                                                    \
        gradient_of_block(cosines, stride, first, num, n, chunk, labels, rows, scale, g, sums);                           \
    } \
    EXPORT(margin_gradient_##T)
GRADIENT(f32)
GRADIENT(bf16)
GRADIENT(f16)

// Turns the gradient u of unit rows into that of the rows x (rows, d) that they were computed from, in place:
//
//     gx = (u - x_hat (x_hat . u)) / |x|,   x_hat = x / |x|
//
// For class centres, x_hat . u is `factor` times the column sums of `sums` (chunks, stride); for embeddings, `sums` is
// null and the dot product is computed. A warp per row. Bytes per element: 12.
KERNEL(margin_through_unit_rows)
(const float* x, const float* inv_norms, const float* sums, int chunks, int stride, float factor, i64 rows, int d, float* u) {
    const i64 row = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const float* from = x + row * d;
    const float inv_norm = inv_norms[row];
    float dot = 0.f;
    if (sums) {
        for (int i = lane; i < chunks; i += WARP) dot += sums[i64(i) * stride + row];
        dot = warp_sum(dot) * factor;
    } else {
        for (int i = lane * 4; i < d; i += WARP * 4) {
            const Pack<float> px = load(from + i), pu = load(u + row * d + i);
#pragma unroll
            for (int k = 0; k < 4; k++) dot += px.at[k] * pu.at[k];
        }
        dot = warp_sum(dot) * inv_norm;
    }
    for (int i = lane * 4; i < d; i += WARP * 4) {
        const Pack<float> px = load(from + i);
        Pack<float> pu = load(u + row * d + i);
#pragma unroll
        for (int k = 0; k < 4; k++) pu.at[k] = (pu.at[k] - px.at[k] * inv_norm * dot) * inv_norm;
        store(u + row * d + i, pu);
    }
}
EXPORT(margin_through_unit_rows)
