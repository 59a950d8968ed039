// Update of all parameters at once. Parameters are contiguous in f32, gradients and moments likewise. Each parameter
// starts at a multiple of 8 elements; the padding between parameters is 0 and stays 0.
#include "common.cuh"

// Decisions of a step about its gradients, kept on the device so that the host does not wait.
struct Guard {
    float norm;         // norm of all gradients together
    float grad_scale;   // factor of the gradients
    int is_finite;      // 0: the step changes nothing
    int num_skipped;    // number of steps that were not finite
};

// Sums of squares of x (len), one per block: f32 within a thread, f64 across threads. Reads 4 bytes per element.
KERNEL(update_squares)(const float* x, i64 len, double* sums) {
    DYNAMIC_SHARED(double, shared);
    float sum = 0.f;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < len; i += i64(gridDim.x) * blockDim.x * 4) {
        const Pack<float> pack = load(x + i);
#pragma unroll
        for (int k = 0; k < 4; k++) sum += pack.at[k] * pack.at[k];
    }
    const double all = block_sum(double(sum), shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = all;
}
EXPORT(update_squares)

// Adds `num` sums of squares. Writes the norm and the scale min(1, max_norm / (norm + 1e-6)), as PyTorch's
// clip_grad_norm_, or 1 if `max_norm` is 0. Counts the step if the norm or the loss (may be null) is not finite. One
// block.
KERNEL(update_guard)(const double* sums, int num, float max_norm, const float* loss, Guard* guard) {
    DYNAMIC_SHARED(double, shared);
    double sum = 0.;
    for (int i = threadIdx.x; i < num; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x > 0) return;
    const float norm = float(sqrt(sum));
    const bool is_finite = norm - norm == 0.f && (!loss || *loss - *loss == 0.f);
    guard->norm = norm;
    guard->grad_scale = max_norm > 0.f ? fminf(1.f, max_norm / (norm + 1e-6f)) : 1.f;
    guard->is_finite = is_finite;
    if (!is_finite) guard->num_skipped++;
}
EXPORT(update_guard)

// SGD as in PyTorch: velocity = momentum * velocity + (grad_scale * grad + decay * param), param -= lr * velocity. Also
// writes the parameters as T to `copy`, if it is not null. `grad_scale` is the guard's if `is_clipped`, else 1. len is
// a multiple of 8. Bytes per element: 20, and the size of T for the copy.
template <class T>
__device__ void sgd(float* param, float* velocity, const float* grad, i64 len, const float* lr, float momentum, float decay,
                    const Guard* guard, int is_clipped, T* copy) {
    if (!guard->is_finite) return;
    const float scale = is_clipped ? guard->grad_scale : 1.f, rate = *lr;
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        Pack<T> as_t;
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            Pack<float> p = load(param + i + k), v = load(velocity + i + k);
            const Pack<float> g = load(grad + i + k);
#pragma unroll
            for (int l = 0; l < 4; l++) {
                v.at[l] = momentum * v.at[l] + (scale * g.at[l] + decay * p.at[l]);
                p.at[l] -= rate * v.at[l];
                as_t.at[k + l] = p.at[l];
            }
            store(param + i + k, p);
            store(velocity + i + k, v);
        }
        if (copy) store(copy + i, as_t);
    }
}

#define SGD(T)                                                                                                            \
    KERNEL(update_sgd_##T)                                                                                                \
    (float* param, float* velocity, const float* grad, i64 len, const float* lr, float momentum, float decay,             \
     const Guard* guard, int is_clipped, T* copy) {                                                                       \
        sgd(param, velocity, grad, len, lr, momentum, decay, guard, is_clipped, copy);                                    \
    } \
    EXPORT(update_sgd_##T)
SGD(f32)
SGD(bf16)
SGD(f16)

// AdamW (Loshchilov and Hutter, ICLR 2019, algorithm 2) in PyTorch's order of operations. `rates` are lr / (1 -
// beta1^t), sqrt(1 - beta2^t) and 1 - lr * decay. Bytes per element: 28, and the size of T for the copy.
template <class T>
__device__ void adamw(float* param, float* mean, float* square, const float* grad, i64 len, const float* rates, float beta1, float beta2,
                      const Guard* guard, int is_clipped, T* copy) {
    if (!guard->is_finite) return;
    const float scale = is_clipped ? guard->grad_scale : 1.f, rate = rates[0], root = rates[1], keep = rates[2];
    constexpr int N = PER_ACCESS<T>;
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += i64(gridDim.x) * blockDim.x * N) {
        Pack<T> as_t;
#pragma unroll
        for (int k = 0; k < N; k += 4) {
            Pack<float> p = load(param + i + k), m = load(mean + i + k), s = load(square + i + k);
            const Pack<float> grads = load(grad + i + k);
#pragma unroll
            for (int l = 0; l < 4; l++) {
                const float g = scale * grads.at[l];
                m.at[l] = beta1 * m.at[l] + (1.f - beta1) * g;
                s.at[l] = beta2 * s.at[l] + (1.f - beta2) * (g * g);
                p.at[l] = keep * p.at[l] - rate * m.at[l] / (sqrtf(s.at[l]) / root + 1e-8f);
                as_t.at[k + l] = p.at[l];
            }
            store(param + i + k, p);
            store(mean + i + k, m);
            store(square + i + k, s);
        }
        if (copy) store(copy + i, as_t);
    }
}

#define ADAMW(T)                                                                                                          \
    KERNEL(update_adamw_##T)                                                                                              \
    (float* param, float* mean, float* square, const float* grad, i64 len, const float* rates, float beta1, float beta2,  \
     const Guard* guard, int is_clipped, T* copy) {                                                                       \
        adamw(param, mean, square, grad, len, rates, beta1, beta2, guard, is_clipped, copy);                              \
    } \
    EXPORT(update_adamw_##T)
ADAMW(f32)
ADAMW(bf16)
ADAMW(f16)

// y = keep * y + share * x, unless the guard (may be null) found the step not finite. With a `keep` of 0, y is not
// read. Any length. Bytes per element: 12, or 8 with a `keep` of 0. Grid: any.
KERNEL(update_blend)(float* y, const float* x, i64 len, float keep, float share, const Guard* guard) {
    if (guard && !guard->is_finite) return;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += i64(gridDim.x) * blockDim.x)
        y[i] = (keep == 0.f ? 0.f : keep * y[i]) + share * x[i];
}
EXPORT(update_blend)
