// libcublas of the stand-in.
#include <map>
#include <memory>
#include <mutex>

#include "numbers.h"
#include "state.h"

namespace stand_in {

void multiply(size_t m, size_t n, size_t k, const float* a, const float* b, float* c) {
    // Blocks of rows of `b` stay in the cache.
    constexpr size_t ROWS = 64, COLUMNS = 512;
    for (size_t j0 = 0; j0 < n; j0 += COLUMNS)
        for (size_t l0 = 0; l0 < k; l0 += ROWS)
            for (size_t i = 0; i < m; i++) {
                const size_t j1 = j0 + COLUMNS < n ? j0 + COLUMNS : n, l1 = l0 + ROWS < k ? l0 + ROWS : k;
                for (size_t l = l0; l < l1; l++) {
                    const float x = a[i * k + l];
                    const float* row = b + l * n;
                    float* sums = c + i * n;
                    for (size_t j = j0; j < j1; j++) sums[j] += x * row[j];
                }
            }
}

namespace {

enum { NOT_INITIALISED = 1, INVALID = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
constexpr const char* KIND = "cuBLAS handle";

struct Handle {
    void* stream = nullptr;
    uint64_t workspace = 0;
    size_t workspace_bytes = 0;
    int math = 0;
};

std::mutex mutex;
std::map<void*, Handle> handles;

bool element_of(int type, Element& element) {
    switch (type) {
        case 0: element = Element::F32; return true;
        case 2: element = Element::F16; return true;
        case 14: element = Element::BF16; return true;
        default: return false;
    }
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

#define API extern "C" __attribute__((visibility("default"))) int

API cublasCreate_v2(void** handle) {
    if (ready("cublasCreate")) return NOT_INITIALISED;
    *handle = born(KIND);
    std::lock_guard lock(mutex);
    handles[*handle] = {};
    return 0;
}

API cublasDestroy_v2(void* handle) {
    if (!dies("cublasDestroy", KIND, handle)) return NOT_INITIALISED;
    std::lock_guard lock(mutex);
    handles.erase(handle);
    return 0;
}

API cublasGetVersion_v2(void*, int* version) {
    *version = int(setting("cublas", 130000));
    return 0;
}

API cublasSetStream_v2(void* handle, void* stream) {
    if (!is_alive("cublasSetStream", KIND, handle)) return NOT_INITIALISED;
    if (!stream_of(stream)) {
        say("cublasSetStream", "no stream, or one that is destroyed");
        return INVALID;
    }
    std::lock_guard lock(mutex);
    handles[handle].stream = stream;
    handles[handle].workspace = handles[handle].workspace_bytes = 0;  // the call sets the workspace back too
    return 0;
}

API cublasSetMathMode(void* handle, int mode) {
    if (!is_alive("cublasSetMathMode", KIND, handle)) return NOT_INITIALISED;
    std::lock_guard lock(mutex);
    handles[handle].math = mode;
    return 0;
}

API cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    if (!is_alive("cublasSetWorkspace", KIND, handle)) return NOT_INITIALISED;
    if (!is_device("cublasSetWorkspace", "the workspace", uint64_t(workspace), 256)) return INVALID;
    std::lock_guard lock(mutex);
    handles[handle].workspace = uint64_t(workspace);
    handles[handle].workspace_bytes = bytes;
    return 0;
}

API cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b,
                 int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int algorithm) {
    const char* call = "cublasGemmEx";
    if (!is_alive(call, KIND, handle)) return NOT_INITIALISED;
    if (ready(call)) return EXECUTION_FAILED;
    const auto wrong = [&](const char* what, int status) {
        say(call, what);
        return status;
    };
    Element ea, eb, ec;
    if (!element_of(type_a, ea) || !element_of(type_b, eb) || !element_of(type_c, ec)) return wrong("types that are not known here", NOT_SUPPORTED);
    constexpr int F32 = 68, F32_TF32 = 77;
    if (compute != F32 && compute != F32_TF32) return wrong("a type of computation that is not known here", NOT_SUPPORTED);
    if (ea != eb || (ec != Element::F32 && ec != ea) || (compute == F32_TF32 && ea != Element::F32)) return wrong("types that do not go together", NOT_SUPPORTED);
    if (m < 0 || n < 0 || k < 0) return wrong("a size below 0", INVALID);
    if (op_a < 0 || op_a > 1 || op_b < 0 || op_b > 1) return wrong("an operation that is not known here", INVALID);
    const auto at_least = [](int x) { return x > 1 ? x : 1; };
    if (lda < at_least(op_a ? k : m) || ldb < at_least(op_b ? n : k) || ldc < at_least(m)) return wrong("a leading dimension that is too small", INVALID);
    if (algorithm != -1) return wrong("an algorithm other than the default", INVALID);
    if (m == 0 || n == 0) return 0;
    if (!is_device(call, "a", uint64_t(a), bytes_of(ea)) || !is_device(call, "b", uint64_t(b), bytes_of(eb)) ||
        !is_device(call, "c", uint64_t(c), bytes_of(ec)))
        return EXECUTION_FAILED;
    Handle settings;
    {
        std::lock_guard lock(mutex);
        settings = handles[handle];
    }
    Stream* stream = stream_of(settings.stream);
    if (!stream) return wrong("its stream is destroyed", INVALID);
    // cuBLAS would compute it, with some of the sums in 16 bits.
    constexpr int NO_REDUCED_PRECISION_REDUCTION = 16;
    if (ea != Element::F32 && !(settings.math & NO_REDUCED_PRECISION_REDUCTION)) return wrong("sums in 16 bits are not ruled out", INVALID);
    // Factors in host memory are read before the call returns.
    const float factor = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
    queue(stream, call, [=] {
        // Column-major: rows and columns change places.
        const auto extent = [](int rows, int columns, int ld) { return size_t(columns - 1) * size_t(ld) + size_t(rows); };
        if (k > 0) {
            check(call, "a", uint64_t(a), (op_a ? extent(k, m, lda) : extent(m, k, lda)) * bytes_of(ea));
            check(call, "b", uint64_t(b), (op_b ? extent(n, k, ldb) : extent(k, n, ldb)) * bytes_of(eb));
        }
        check(call, "c", uint64_t(c), extent(m, n, ldc) * bytes_of(ec));
        if (settings.workspace) check(call, "the workspace", settings.workspace, settings.workspace_bytes);
        const auto value = [&](const void* x, size_t at, Element element) {
            const float v = get(x, at, element);
            return compute == F32_TF32 ? tf32(v) : v;
        };
        const size_t M = size_t(m), N = size_t(n), K = size_t(k);
        // c' = b' a', row by row.
        std::vector<float> left(N * K), right(K * M), sums(N * M, 0.f);
        for (size_t j = 0; j < N; j++)
            for (size_t l = 0; l < K; l++) left[j * K + l] = value(b, op_b ? l * size_t(ldb) + j : j * size_t(ldb) + l, eb);
        for (size_t l = 0; l < K; l++)
            for (size_t i = 0; i < M; i++) right[l * M + i] = value(a, op_a ? i * size_t(lda) + l : l * size_t(lda) + i, ea);
        multiply(N, M, K, left.data(), right.data(), sums.data());
        for (size_t j = 0; j < N; j++)
            for (size_t i = 0; i < M; i++) {
                const size_t at = j * size_t(ldc) + i;
                const float before = keep == 0.f ? 0.f : keep * get(c, at, ec);
                set(c, at, ec, factor * sums[j * M + i] + before);
            }
    });
    return 0;
}
