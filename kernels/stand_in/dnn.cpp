// libcudnn of the stand-in: the convolutions of cuDNN 9's legacy interface.
#include <atomic>
#include <map>
#include <mutex>

#include "numbers.h"
#include "state.h"

namespace stand_in {
namespace {

enum { NOT_INITIALISED = 1001, BAD_PARAM = 2000, UNSUPPORTED = 3000, EXECUTION_FAILED = 5000 };
enum { DEFAULT_MATH = 0, TENSOR_OP = 1, TENSOR_OP_CONVERSION = 2, FMA = 3 };
constexpr const char *HANDLE = "cuDNN handle", *TENSOR = "tensor descriptor", *FILTER = "filter descriptor", *CONV = "convolution descriptor";

struct Array {
    bool is_set = false;
    Element element;
    int n, c, h, w;
    size_t count() const { return size_t(n) * size_t(c) * size_t(h) * size_t(w); }
    size_t bytes() const { return count() * bytes_of(element); }
};

struct Conv {
    bool is_set = false;
    int padding, stride, math = DEFAULT_MATH, groups = 1;
};

std::mutex mutex;
std::map<void*, void*> streams;
std::map<const void*, Array> arrays;
std::map<const void*, Conv> convs;

bool element_of(int type, Element& element) {
    switch (type) {
        case 0: element = Element::F32; return true;
        case 2: element = Element::F16; return true;
        case 9: element = Element::BF16; return true;
        default: return false;
    }
}

enum Pass { FORWARD, GRAD_X, GRAD_W };
const char* const CALLS[3] = {"cudnnConvolutionForward", "cudnnConvolutionBackwardData", "cudnnConvolutionBackwardFilter"};

// What a pass works on.
struct Task {
    Pass pass;
    Array x, w, y;
    Conv conv;
    uint64_t px, pw, py;
};

Stream* stream_of_handle(void* handle) {
    void* stream;
    {
        std::lock_guard lock(mutex);
        stream = streams[handle];
    }
    return stream_of(stream);
}

int wrong(const char* call, const char* what, int status) {
    say(call, what);
    return status;
}

// Checks descriptors and addresses; 0 if a convolution of cuDNN 9 would take them.
int described(const char* call, Pass pass, void* handle, const void* x, const void* px, const void* w, const void* pw, const void* conv,
              const void* y, const void* py, Task& task) {
    if (!is_alive(call, HANDLE, handle)) return NOT_INITIALISED;
    if (ready(call)) return EXECUTION_FAILED;
    if (!is_alive(call, TENSOR, x) || !is_alive(call, TENSOR, y) || !is_alive(call, FILTER, w) || !is_alive(call, CONV, conv)) return BAD_PARAM;
    {
        std::lock_guard lock(mutex);
        task = {pass, arrays[x], arrays[w], arrays[y], convs[conv], uint64_t(px), uint64_t(pw), uint64_t(py)};
    }
    const auto& [_, tx, tw, ty, c, ax, aw, ay] = task;
    if (!tx.is_set || !tw.is_set || !ty.is_set || !c.is_set) return wrong(call, "a descriptor that is not set", BAD_PARAM);
    if (tx.element != tw.element || tx.element != ty.element) return wrong(call, "elements of several types", UNSUPPORTED);
    if (c.groups != 1) return wrong(call, "groups of channels last", UNSUPPORTED);
    if (tx.c != tw.c || ty.c != tw.n || tx.n != ty.n) return wrong(call, "numbers of images or channels that do not fit", BAD_PARAM);
    const auto side = [&](int in, int k) { return (in + 2 * c.padding - k) / c.stride + 1; };
    if (ty.h != side(tx.h, tw.h) || ty.w != side(tx.w, tw.w)) return wrong(call, "an output of another size", BAD_PARAM);
    const size_t alignment = tx.element == Element::F32 ? 4 : 16;
    if (!is_device(call, "x", ax, alignment) || !is_device(call, "w", aw, alignment) || !is_device(call, "y", ay, alignment)) return BAD_PARAM;
    return 0;
}

// Whether an algorithm runs under a type of math, with how much workspace, and whether its results are reproducible.
struct Way {
    int algorithm, math;
    size_t workspace;
    bool is_deterministic;
};

// The ways in the order of a search. Half-precision algorithms need tensor cores; of f32 the fastest may round to TF32
// unless it is forbidden.
std::vector<Way> ways(const Task& task) {
    const bool is_half = task.x.element != Element::F32;
    const size_t columns = size_t(task.w.c) * size_t(task.w.h) * size_t(task.w.w) * size_t(task.y.h) * size_t(task.y.w) * 4;
    const int math = task.conv.math;
    std::vector<Way> found;
    if (task.pass == GRAD_W) found.push_back({0, is_half ? TENSOR_OP : FMA, 0, false});
    if (is_half) {
        // Measured under default math, for which these types have no tensor cores.
        if (math != FMA) found.push_back({1, TENSOR_OP, columns, true});
    } else {
        if (math == TENSOR_OP || math == TENSOR_OP_CONVERSION || math == DEFAULT_MATH) found.push_back({1, TENSOR_OP_CONVERSION, columns, true});
        // Nobody promises that a search for tensor cores measures the way without them.
        if (math == FMA || math == DEFAULT_MATH) found.push_back({1, FMA, columns, true});
    }
    if (task.pass == FORWARD) found.push_back({0, is_half ? DEFAULT_MATH : FMA, 0, true});
    if (task.pass == GRAD_X) found.push_back({0, FMA, 0, false});
    return found;
}

// Calls `f` for each pixel in each window of an image with the places of its first channel in the windows and in `x`.
template <class F> void for_each_pixel(const Task& t, int image, F f) {
    size_t at = 0;
    for (int oy = 0; oy < t.y.h; oy++)
        for (int ox = 0; ox < t.y.w; ox++)
            for (int ky = 0; ky < t.w.h; ky++)
                for (int kx = 0; kx < t.w.w; kx++, at += size_t(t.x.c)) {
                    const int iy = oy * t.conv.stride - t.conv.padding + ky, ix = ox * t.conv.stride - t.conv.padding + kx;
                    if (iy < 0 || iy >= t.x.h || ix < 0 || ix >= t.x.w) continue;
                    f(at, ((size_t(image) * size_t(t.x.h) + size_t(iy)) * size_t(t.x.w) + size_t(ix)) * size_t(t.x.c));
                }
}

// Rows are the places of the output, columns the values of the window at each.
std::vector<float> windows(const Task& t, const std::vector<float>& x, int image) {
    const size_t values = size_t(t.w.h) * size_t(t.w.w) * size_t(t.x.c);
    std::vector<float> rows(size_t(t.y.h) * size_t(t.y.w) * values, 0.f);
    for_each_pixel(t, image, [&](size_t at, size_t from) { memcpy(&rows[at], &x[from], size_t(t.x.c) * sizeof(float)); });
    return rows;
}

std::vector<float> transposed(const std::vector<float>& a, size_t rows, size_t columns) {
    std::vector<float> b(a.size());
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) b[j * rows + i] = a[i * columns + j];
    return b;
}

std::vector<float> values_of(uint64_t address, const Array& array, bool is_tf32) {
    std::vector<float> values(array.count());
    for (size_t i = 0; i < values.size(); i++) {
        values[i] = get(reinterpret_cast<void*>(address), i, array.element);
        if (is_tf32) values[i] = tf32(values[i]);
    }
    return values;
}

void run(const Task& t, bool is_tf32) {
    const char* call = CALLS[t.pass];
    check(call, "x", t.px, t.x.bytes());
    check(call, "w", t.pw, t.w.bytes());
    check(call, "y", t.py, t.y.bytes());
    const size_t places = size_t(t.y.h) * size_t(t.y.w), window = size_t(t.w.h) * size_t(t.w.w) * size_t(t.x.c), filters = size_t(t.w.n);
    std::vector<float> x, w, y;
    if (t.pass != GRAD_X) x = values_of(t.px, t.x, is_tf32);
    if (t.pass != GRAD_W) w = values_of(t.pw, t.w, is_tf32);
    if (t.pass != FORWARD) y = values_of(t.py, t.y, is_tf32);
    const auto store = [](uint64_t address, const Array& array, const std::vector<float>& values) {
        for (size_t i = 0; i < values.size(); i++) set(reinterpret_cast<void*>(address), i, array.element, values[i]);
    };
    if (t.pass == FORWARD) {
        y.assign(t.y.count(), 0.f);
        const std::vector<float> turned = transposed(w, filters, window);
        for (int image = 0; image < t.x.n; image++)
            multiply(places, filters, window, windows(t, x, image).data(), turned.data(), &y[size_t(image) * places * filters]);
        return store(t.py, t.y, y);
    }
    if (t.pass == GRAD_W) {
        w.assign(t.w.count(), 0.f);
        for (int image = 0; image < t.x.n; image++) {
            const std::vector<float> part(&y[size_t(image) * places * filters], &y[size_t(image) * places * filters] + places * filters);
            multiply(filters, window, places, transposed(part, places, filters).data(), windows(t, x, image).data(), w.data());
        }
        return store(t.pw, t.w, w);
    }
    x.assign(t.x.count(), 0.f);
    std::vector<float> rows(places * window);
    for (int image = 0; image < t.x.n; image++) {
        std::fill(rows.begin(), rows.end(), 0.f);
        multiply(places, window, filters, &y[size_t(image) * places * filters], w.data(), rows.data());
        for_each_pixel(t, image, [&](size_t at, size_t to) {
            for (size_t channel = 0; channel < size_t(t.x.c); channel++) x[to + channel] += rows[at + channel];
        });
    }
    store(t.px, t.x, x);
}

int convolve(Pass pass, void* handle, const void* alpha, const void* x, const void* px, const void* w, const void* pw, const void* conv,
             int algorithm, void* workspace, size_t bytes, const void* beta, const void* y, const void* py) {
    const char* call = CALLS[pass];
    Task task;
    if (int status = described(call, pass, handle, x, px, w, pw, conv, y, py, task)) return status;
    if (*static_cast<const float*>(alpha) != 1.f || *static_cast<const float*>(beta) != 0.f) return wrong(call, "factors other than 1 and 0", UNSUPPORTED);
    const auto all = ways(task);
    const Way* way = nullptr;
    for (const Way& known : all)
        if (known.algorithm == algorithm && known.math == task.conv.math) way = &known;
    static std::atomic<long> num_calls{0};
    const long number = ++num_calls;
    if (number == setting("unsupported", 0)) return UNSUPPORTED + 12;
    if (!way) return wrong(call, "the algorithm does not run under the descriptor's type of math", UNSUPPORTED);
    if (bytes < way->workspace) return wrong(call, "a workspace that is too small", BAD_PARAM);
    if (way->workspace && !is_device(call, "the workspace", uint64_t(workspace), 256)) return BAD_PARAM;
    Stream* stream = stream_of_handle(handle);
    if (!stream) return wrong(call, "its stream is destroyed", BAD_PARAM);
    const bool is_tf32 = task.x.element == Element::F32 && way->math != FMA;
    const size_t used = way->workspace;
    const bool is_off = !way->is_deterministic && number % 2;
    queue(stream, call, [=] {
        // It holds intermediate values: whoever shares it between streams sees them change.
        if (used) {
            check(call, "the workspace", uint64_t(workspace), used);
            memset(workspace, 0xff, used);
        }
        run(task, is_tf32);
        // What is not reproducible differs from call to call.
        if (is_off) {
            const Array& out = pass == FORWARD ? task.y : pass == GRAD_X ? task.x : task.w;
            void* values = reinterpret_cast<void*>(pass == FORWARD ? task.py : pass == GRAD_X ? task.px : task.pw);
            for (size_t i = 0; i < out.count(); i++) set(values, i, out.element, 1.02f * get(values, i, out.element));
        }
    });
    return 0;
}

struct Perf {
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};

int find(Pass pass, void* handle, const void* x, const void* px, const void* w, const void* pw, const void* conv, const void* y, const void* py,
         int wanted, int* num, Perf* found, void* workspace, size_t bytes) {
    const char* call = CALLS[pass];
    Task task;
    if (int status = described(call, pass, handle, x, px, w, pw, conv, y, py, task)) return status;
    if (wanted < 1) return wrong(call, "no room for a result", BAD_PARAM);
    if (bytes && !is_device(call, "the workspace", uint64_t(workspace), 256)) return BAD_PARAM;
    *num = 0;
    // An algorithm that did not run; its other values mean nothing.
    if (wanted > 1) found[(*num)++] = {7, EXECUTION_FAILED, 0.01f, 0, 1, FMA, {}};
    // A search may try other math than the descriptor's.
    if (wanted > 2 && task.x.element == Element::F32 && task.conv.math == FMA && setting("ways", wanted) > 0) {
        Task tensor = task;
        tensor.conv.math = TENSOR_OP_CONVERSION;
        for (const Way& way : ways(tensor))
            if (way.math == TENSOR_OP_CONVERSION && way.workspace <= bytes) found[(*num)++] = {way.algorithm, 0, 0.05f, way.workspace, way.is_deterministic, way.math, {}};
    }
    int num_offered = 0;
    for (const Way& way : ways(task)) {
        if (*num == wanted || num_offered == setting("ways", wanted)) break;
        const int status = way.workspace <= bytes ? 0 : UNSUPPORTED;
        const float ms = 0.1f + 0.1f * float(num_offered++);
        found[(*num)++] = {way.algorithm, status, ms, way.workspace, way.is_deterministic, way.math, {}};
    }
    // A search runs what it measures: the output is overwritten.
    if (Stream* stream = stream_of_handle(handle)) {
        const uint64_t out = pass == FORWARD ? task.py : pass == GRAD_X ? task.px : task.pw;
        const size_t size = (pass == FORWARD ? task.y : pass == GRAD_X ? task.x : task.w).bytes();
        queue(stream, call, [=] {
            check(call, "the output of a search", out, size);
            memset(reinterpret_cast<void*>(out), 0xff, size);
        });
        drain(stream);
    }
    return 0;
}

int set_array(const char* call, const char* kind, void* descriptor, int type, int format, int n, int c, int h, int w) {
    if (!is_alive(call, kind, descriptor)) return BAD_PARAM;
    Array array{true, Element::F32, n, c, h, w};
    if (format != 1) return wrong(call, "a layout other than channels last", UNSUPPORTED);
    if (!element_of(type, array.element)) return wrong(call, "a type that is not known here", UNSUPPORTED);
    if (n < 1 || c < 1 || h < 1 || w < 1) return wrong(call, "a size below 1", BAD_PARAM);
    std::lock_guard lock(mutex);
    arrays[descriptor] = array;
    return 0;
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

#define EXPORTED extern "C" __attribute__((visibility("default")))
#define API EXPORTED int

EXPORTED size_t cudnnGetVersion() { return size_t(setting("cudnn", 90100)); }

API cudnnCreate(void** handle) {
    if (ready("cudnnCreate")) return NOT_INITIALISED;
    *handle = born(HANDLE);
    std::lock_guard lock(mutex);
    streams[*handle] = nullptr;
    return 0;
}

API cudnnDestroy(void* handle) { return dies("cudnnDestroy", HANDLE, handle) ? 0 : BAD_PARAM; }

API cudnnSetStream(void* handle, void* stream) {
    if (!is_alive("cudnnSetStream", HANDLE, handle)) return NOT_INITIALISED;
    if (!stream_of(stream)) return wrong("cudnnSetStream", "no stream", BAD_PARAM);
    std::lock_guard lock(mutex);
    streams[handle] = stream;
    return 0;
}

#define DESCRIPTOR(name, kind)                                                                     \
    API cudnnCreate##name##Descriptor(void** descriptor) {                                         \
        *descriptor = born(kind);                                                                  \
        return 0;                                                                                  \
    }                                                                                              \
    API cudnnDestroy##name##Descriptor(void* descriptor) {                                         \
        return dies("cudnnDestroy" #name "Descriptor", kind, descriptor) ? 0 : BAD_PARAM;          \
    }
DESCRIPTOR(Tensor, TENSOR)
DESCRIPTOR(Filter, FILTER)
DESCRIPTOR(Convolution, CONV)

API cudnnSetTensor4dDescriptor(void* descriptor, int format, int type, int n, int c, int h, int w) {
    return set_array("cudnnSetTensor4dDescriptor", TENSOR, descriptor, type, format, n, c, h, w);
}

API cudnnSetFilter4dDescriptor(void* descriptor, int type, int format, int k, int c, int h, int w) {
    return set_array("cudnnSetFilter4dDescriptor", FILTER, descriptor, type, format, k, c, h, w);
}

API cudnnSetConvolution2dDescriptor(void* descriptor, int pad_h, int pad_w, int u, int v, int dilation_h, int dilation_w, int mode, int compute) {
    const char* call = "cudnnSetConvolution2dDescriptor";
    if (!is_alive(call, CONV, descriptor)) return BAD_PARAM;
    if (pad_h != pad_w || u != v || dilation_h != 1 || dilation_w != 1 || mode != 1) return wrong(call, "settings that are not known here", UNSUPPORTED);
    if (pad_h < 0 || u < 1) return wrong(call, "padding below 0 or a stride below 1", BAD_PARAM);
    if (compute != 0) return wrong(call, "a computation that is not in f32", UNSUPPORTED);
    std::lock_guard lock(mutex);
    convs[descriptor] = {true, pad_h, u, DEFAULT_MATH, 1};
    return 0;
}

API cudnnSetConvolutionMathType(void* descriptor, int math) {
    if (!is_alive("cudnnSetConvolutionMathType", CONV, descriptor) || math < 0 || math > 3) return BAD_PARAM;
    std::lock_guard lock(mutex);
    convs[descriptor].math = math;
    return 0;
}

API cudnnSetConvolutionGroupCount(void* descriptor, int groups) {
    if (!is_alive("cudnnSetConvolutionGroupCount", CONV, descriptor) || groups < 1) return BAD_PARAM;
    std::lock_guard lock(mutex);
    convs[descriptor].groups = groups;
    return 0;
}

API cudnnConvolutionForward(void* handle, const void* alpha, const void* x, const void* px, const void* w, const void* pw, const void* conv,
                            int algorithm, void* workspace, size_t bytes, const void* beta, const void* y, void* py) {
    return convolve(FORWARD, handle, alpha, x, px, w, pw, conv, algorithm, workspace, bytes, beta, y, py);
}

API cudnnConvolutionBackwardData(void* handle, const void* alpha, const void* w, const void* pw, const void* y, const void* py, const void* conv,
                                 int algorithm, void* workspace, size_t bytes, const void* beta, const void* x, void* px) {
    return convolve(GRAD_X, handle, alpha, x, px, w, pw, conv, algorithm, workspace, bytes, beta, y, py);
}

API cudnnConvolutionBackwardFilter(void* handle, const void* alpha, const void* x, const void* px, const void* y, const void* py, const void* conv,
                                   int algorithm, void* workspace, size_t bytes, const void* beta, const void* w, void* pw) {
    return convolve(GRAD_W, handle, alpha, x, px, w, pw, conv, algorithm, workspace, bytes, beta, y, py);
}

API cudnnFindConvolutionForwardAlgorithmEx(void* handle, const void* x, const void* px, const void* w, const void* pw, const void* conv,
                                           const void* y, void* py, int wanted, int* num, void* found, void* workspace, size_t bytes) {
    return find(FORWARD, handle, x, px, w, pw, conv, y, py, wanted, num, static_cast<Perf*>(found), workspace, bytes);
}

API cudnnFindConvolutionBackwardDataAlgorithmEx(void* handle, const void* w, const void* pw, const void* y, const void* py, const void* conv,
                                                const void* x, void* px, int wanted, int* num, void* found, void* workspace, size_t bytes) {
    return find(GRAD_X, handle, x, px, w, pw, conv, y, py, wanted, num, static_cast<Perf*>(found), workspace, bytes);
}

API cudnnFindConvolutionBackwardFilterAlgorithmEx(void* handle, const void* x, const void* px, const void* y, const void* py, const void* conv,
                                                  const void* w, void* pw, int wanted, int* num, void* found, void* workspace, size_t bytes) {
    return find(GRAD_W, handle, x, px, w, pw, conv, y, py, wanted, num, static_cast<Perf*>(found), workspace, bytes);
}
