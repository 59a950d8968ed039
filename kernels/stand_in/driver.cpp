// libcuda of the stand-in.
#include "state.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "host.h"

// Under AddressSanitizer an allocation ends at its last byte.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

extern "C" const char* host_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared_bytes, const char* types,
                                   void** args, unsigned seed);
extern "C" const char* host_types(const char* name);

namespace stand_in {
namespace {

constexpr size_t PAGE = 4096, ALIGNED = 256, POISONED = 32 << 20;
constexpr unsigned char POISON = 0xff;

struct Allocation {
    size_t bytes;
    // The mapping around it.
    unsigned char* mapping;
    size_t mapped;
    bool is_freed;
};

}  // namespace

struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    struct Work {
        const char* name;
        std::function<void()> run;
    };
    std::deque<Work> works;
    bool is_busy = false, ends = false;
    void* const context;
    std::mt19937 random;
    std::thread thread;

    Stream(void* context, unsigned seed) : context(context), random(seed), thread([this] { run(); }) {}
    ~Stream() {
        {
            std::lock_guard lock(mutex);
            ends = true;
        }
        changed.notify_all();
        thread.join();
    }
    void run();
};

namespace {

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    // Records that were queued, and that were reached.
    unsigned long queued = 0, reached = 0;
    std::chrono::steady_clock::time_point time;
};

struct State {
    std::mutex mutex;
    bool is_initialised = false;
    std::atomic<int> error{0};
    std::map<uint64_t, Allocation> memory;
    size_t used = 0;
    long num_allocations = 0, num_launches = 0, num_pinned = 0, num_unpinned = 0;
    std::map<uint64_t, size_t> pinned;
    size_t pinned_bytes = 0;
    std::map<void*, std::shared_ptr<Stream>> streams;
    std::map<void*, std::shared_ptr<Event>> events;
    std::map<const void*, std::string> objects;
    std::map<void*, std::string> modules;
    std::map<void*, std::string> functions;
    std::map<int, int> retained;
    uint64_t next = 0x1000;

    void* handle() { return reinterpret_cast<void*>(next += 0x10); }
    ~State();
};

State& state() {
    // Never destroyed before the process ends: calls may come from destructors.
    static State* state = new State;
    return *state;
}

thread_local void* current = nullptr;
thread_local const char* running = nullptr;

// At the end of the process.
void report() {
    State& s = state();
    if (setting("counts", 0))
        fprintf(stderr, "stand-in counts: %ld launches, %ld allocations, %ld of pinned memory, %ld of those freed\n", s.num_launches,
                s.num_allocations, s.num_pinned, s.num_unpinned);
    // After a fault nothing can be freed any more.
    if (s.error) return;
    size_t num = 0, bytes = 0;
    for (auto& [_, a] : s.memory)
        if (!a.is_freed) num++, bytes += a.bytes;
    if (num) say("exit", std::to_string(num) + " allocations of " + std::to_string(bytes) + " bytes are not freed");
    if (!s.pinned.empty()) say("exit", std::to_string(s.pinned.size()) + " pinned buffers are not freed");
    if (!s.events.empty()) say("exit", std::to_string(s.events.size()) + " events are not destroyed");
    if (!s.objects.empty()) say("exit", std::to_string(s.objects.size()) + " handles or descriptors are not destroyed, such as " + s.objects.begin()->second);
}

// An access outside of memory in a kernel: says which, and ends the process as nothing could go on.
void on_fault(int, siginfo_t* info, void*) {
    char text[256];
    const int len = snprintf(text, sizeof text, "stand-in: %s: an access to address %p, where no memory is allocated\n",
                             running ? running : "the host", info->si_addr);
    if (write(2, text, size_t(len)) < 0) _exit(98);
    _exit(99);
}

void prepare() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGBUS, &action, nullptr);
        atexit(report);
    });
}

const Allocation* allocation_at(uint64_t address, uint64_t* start) {
    State& s = state();
    auto after = s.memory.upper_bound(address);
    if (after == s.memory.begin()) return nullptr;
    --after;
    if (address >= after->first + std::max<size_t>(after->second.bytes, 1)) return nullptr;
    *start = after->first;
    return &after->second;
}

bool is_pinned(const void* p, size_t bytes) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    auto after = s.pinned.upper_bound(uint64_t(p));
    if (after == s.pinned.begin()) return false;
    --after;
    return uint64_t(p) + bytes <= after->first + after->second;
}

int allocate(const char* call, uint64_t* out, size_t bytes) {
    if (int error = ready(call)) return error;
    if (bytes == 0) {
        say(call, "an allocation of no bytes");
        return INVALID_VALUE;
    }
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (++s.num_allocations == setting("oom", 0) || s.used + bytes > size_t(setting("memory", 8l << 30))) return OUT_OF_MEMORY;
    const size_t data = (bytes + ALIGNED - 1) / ALIGNED * ALIGNED, pages = (data + PAGE - 1) / PAGE * PAGE;
    const size_t mapped = pages + 2 * PAGE;
    void* mapping = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    unsigned char* first = static_cast<unsigned char*>(mapping) + PAGE;
    if (mprotect(first, pages, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    // It ends as near to the guard page as its alignment lets it.
    unsigned char* begin = first + pages - data;
    // Of large ones, such as the workspace of a search, only both ends: the rest costs nothing while nothing touches it.
    memset(begin, POISON, std::min(data, POISONED));
    memset(begin + data - std::min(data, PAGE), POISON, std::min(data, PAGE));
    ASAN_POISON_MEMORY_REGION(begin + bytes, data - bytes);
    s.memory[uint64_t(begin)] = {bytes, static_cast<unsigned char*>(mapping), mapped, false};
    s.used += bytes;
    *out = uint64_t(begin);
    return SUCCESS;
}

// Frees memory, once the stream's work before it is done.
void release(const char* call, uint64_t address) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    Allocation& a = s.memory[address];
    const unsigned char *past = reinterpret_cast<unsigned char*>(address) + a.bytes, *end = a.mapping + a.mapped - PAGE;
    // Only what was poisoned: of all of it, the sanitizer's shadow would grow with every workspace.
    ASAN_UNPOISON_MEMORY_REGION(past, end - past);
    for (const unsigned char* p = past; p < end; p++)
        if (*p != POISON) {
            say(call, "a write past the end of an allocation of " + std::to_string(a.bytes) + " bytes");
            break;
        }
    a.is_freed = true;
    s.used -= a.bytes;
    mprotect(a.mapping, a.mapped, PROT_NONE);
    madvise(a.mapping, a.mapped, MADV_DONTNEED);
}

int free_checked(const char* call, uint64_t address) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    auto found = s.memory.find(address);
    if (found == s.memory.end() || found->second.is_freed) {
        say(call, found == s.memory.end() ? "no address of an allocation" : "memory that is freed already");
        return INVALID_VALUE;
    }
    return SUCCESS;
}

}  // namespace

long setting(const char* name, long otherwise) {
    const char* text = getenv("MASKINV_STAND_IN");
    const size_t len = strlen(name);
    while (text && *text) {
        if (!strncmp(text, name, len) && text[len] == '=') return atol(text + len + 1);
        text = strchr(text, ',');
        if (text) text++;
    }
    return otherwise;
}

void say(const char* call, const std::string& what) { fprintf(stderr, "stand-in: %s: %s\n", call, what.c_str()); }

void Stream::run() {
    const long lag = setting("lag", 50);
    for (;;) {
        Work work;
        {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return ends || !works.empty(); });
            if (works.empty()) return;
            work = std::move(works.front());
            works.pop_front();
            is_busy = true;
        }
        // Late: whoever does not wait for it finds the old values.
        if (lag > 0 && random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % unsigned(lag)));
        running = work.name;
        work.run();
        running = nullptr;
        {
            std::lock_guard lock(mutex);
            is_busy = false;
        }
        changed.notify_all();
    }
}

Stream* stream_of(void* handle) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    auto found = s.streams.find(handle);
    if (found != s.streams.end()) return found->second.get();
    if (handle != nullptr) return nullptr;
    return (s.streams[nullptr] = std::make_shared<Stream>(current, unsigned(setting("seed", 1)))).get();
}

void queue(Stream* stream, const char* name, std::function<void()> work) {
    {
        std::lock_guard lock(stream->mutex);
        stream->works.push_back({name, std::move(work)});
    }
    stream->changed.notify_all();
}

void drain(Stream* stream) {
    std::unique_lock lock(stream->mutex);
    stream->changed.wait(lock, [&] { return stream->works.empty() && !stream->is_busy; });
}

int ready(const char* call) {
    if (!state().is_initialised) {
        say(call, "called before cuInit");
        return NOT_INITIALIZED;
    }
    if (int error = state().error) return error;
    if (!current) {
        say(call, "the calling thread has no context");
        return INVALID_CONTEXT;
    }
    return SUCCESS;
}

void* current_context() { return current; }

void spoil(const char* call, const std::string& what) {
    say(call, what);
    state().error = ILLEGAL_ADDRESS;
}

void check(const char* call, const char* name, uint64_t address, size_t bytes) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    uint64_t start = 0;
    const Allocation* a = allocation_at(address, &start);
    if (!a)
        spoil(call, std::string(name) + ": no device memory");
    else if (a->is_freed)
        spoil(call, std::string(name) + ": memory that is freed");
    else if (address + bytes > start + a->bytes)
        spoil(call, std::string(name) + ": " + std::to_string(address + bytes - start - a->bytes) + " bytes past the end of its memory");
}

bool is_device(const char* call, const char* name, uint64_t address, size_t alignment) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    uint64_t start = 0;
    const Allocation* a = allocation_at(address, &start);
    if (!a || a->is_freed) {
        say(call, std::string(name) + (a ? ": memory that is freed" : ": no device memory"));
        return false;
    }
    if (address % alignment) {
        say(call, std::string(name) + ": not aligned to " + std::to_string(alignment) + " bytes");
        return false;
    }
    return true;
}

void* born(const char* kind) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    void* object = s.handle();
    s.objects[object] = kind;
    return object;
}

bool is_alive(const char* call, const char* kind, const void* object) {
    State& s = state();
    std::lock_guard lock(s.mutex);
    auto found = s.objects.find(object);
    if (found != s.objects.end() && found->second == kind) return true;
    say(call, std::string("no ") + kind + ", or one that is destroyed");
    return false;
}

bool dies(const char* call, const char* kind, const void* object) {
    if (!is_alive(call, kind, object)) return false;
    State& s = state();
    std::lock_guard lock(s.mutex);
    s.objects.erase(object);
    return true;
}

}  // namespace stand_in

using namespace stand_in;

#define API extern "C" __attribute__((visibility("default"))) int

API cuInit(unsigned flags) {
    if (flags != 0) return INVALID_VALUE;
    if (setting("devices", 1) == 0) return NO_DEVICE;
    prepare();
    state().is_initialised = true;
    return SUCCESS;
}

API cuDriverGetVersion(int* version) {
    *version = int(setting("driver", 13000));
    return SUCCESS;
}

API cuGetErrorName(int error, const char** text) {
    switch (error) {
        case SUCCESS: *text = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NOT_INITIALIZED: *text = "CUDA_ERROR_NOT_INITIALIZED"; break;
        case NO_DEVICE: *text = "CUDA_ERROR_NO_DEVICE"; break;
        case INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case NO_BINARY: *text = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
        case INVALID_HANDLE: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
        case NOT_READY: *text = "CUDA_ERROR_NOT_READY"; break;
        case ILLEGAL_ADDRESS: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        default: *text = nullptr; return INVALID_VALUE;
    }
    return SUCCESS;
}

API cuGetErrorString(int error, const char** text) { return cuGetErrorName(error, text); }

API cuDeviceGetCount(int* count) {
    *count = int(setting("devices", 1));
    return state().is_initialised ? SUCCESS : NOT_INITIALIZED;
}

API cuDeviceGet(int* device, int ordinal) {
    if (!state().is_initialised) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= setting("devices", 1)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char* name, int len, int) {
    snprintf(name, size_t(len), "stand-in GPU");
    return SUCCESS;
}

API cuDeviceGetUuid_v2(unsigned char uuid[16], int device) {
    const int numbers[4] = {0x5741, int(getpid()), device, 0};
    memcpy(uuid, numbers, sizeof numbers);
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = size_t(setting("memory", 8l << 30));
    return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 75: *value = int(setting("capability", 90) / 10); break;  // major compute capability
        case 76: *value = int(setting("capability", 90) % 10); break;  // minor
        case 115: *value = 1; break;        // memory pools
        case 16: *value = 4; break;         // multiprocessors
        case 8: *value = 48 * 1024; break;  // shared memory of a block
        case 97: *value = 227 * 1024; break;
        default: say("cuDeviceGetAttribute", "attribute " + std::to_string(attribute) + " is not known here"); return INVALID_VALUE;
    }
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!state().is_initialised) return NOT_INITIALIZED;
    std::lock_guard lock(state().mutex);
    state().retained[device]++;
    *context = reinterpret_cast<void*>(uintptr_t(0x100 + device));
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int device) {
    State& s = state();
    bool is_last;
    {
        std::lock_guard lock(s.mutex);
        if (s.retained[device] == 0) return INVALID_CONTEXT;
        is_last = --s.retained[device] == 0;
    }
    (void)is_last;
    return SUCCESS;
}

API cuCtxSetCurrent(void* context) {
    if (int error = state().error) return error;
    current = context;
    return SUCCESS;
}

API cuCtxGetCurrent(void** context) {
    *context = current;
    return SUCCESS;
}

API cuCtxSynchronize() {
    if (int error = ready("cuCtxSynchronize")) return error;
    // Other threads may destroy them meanwhile.
    std::vector<std::shared_ptr<Stream>> of_context;
    {
        std::lock_guard lock(state().mutex);
        for (auto& [_, stream] : state().streams)
            if (stream->context == current) of_context.push_back(stream);
    }
    for (auto& stream : of_context) drain(stream.get());
    return state().error;
}

API cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (int error = ready("cuMemGetInfo")) return error;
    std::lock_guard lock(state().mutex);
    *total = size_t(setting("memory", 8l << 30));
    *free = *total - state().used;
    return SUCCESS;
}

API cuStreamCreate(void** stream, unsigned) {
    if (int error = ready("cuStreamCreate")) return error;
    State& s = state();
    std::lock_guard lock(s.mutex);
    *stream = s.handle();
    s.streams[*stream] = std::make_shared<Stream>(current, unsigned(setting("seed", 1)) + unsigned(s.streams.size()));
    return SUCCESS;
}

API cuStreamDestroy_v2(void* stream) {
    if (!stream_of(stream)) return INVALID_HANDLE;
    drain(stream_of(stream));
    std::shared_ptr<Stream> owned;
    {
        std::lock_guard lock(state().mutex);
        owned = std::move(state().streams[stream]);
        state().streams.erase(stream);
    }
    return SUCCESS;
}

API cuStreamSynchronize(void* handle) {
    if (int error = ready("cuStreamSynchronize")) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    drain(stream);
    return state().error;
}

API cuMemAlloc_v2(uint64_t* out, size_t bytes) { return allocate("cuMemAlloc", out, bytes); }

API cuMemAllocAsync(uint64_t* out, size_t bytes, void* stream) {
    if (!stream_of(stream)) return INVALID_HANDLE;
    return allocate("cuMemAllocAsync", out, bytes);
}

API cuMemFree_v2(uint64_t address) {
    if (int error = cuCtxSynchronize()) return error;
    if (int error = free_checked("cuMemFree", address)) return error;
    release("cuMemFree", address);
    return SUCCESS;
}

API cuMemFreeAsync(uint64_t address, void* handle) {
    if (int error = ready("cuMemFreeAsync")) return error;
    if (int error = free_checked("cuMemFreeAsync", address)) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    queue(stream, "cuMemFreeAsync", [address] { release("cuMemFreeAsync", address); });
    return SUCCESS;
}

API cuMemHostAlloc(void** out, size_t bytes, unsigned) {
    if (int error = ready("cuMemHostAlloc")) return error;
    if (bytes == 0) {
        say("cuMemHostAlloc", "an allocation of no bytes");
        return INVALID_VALUE;
    }
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (s.pinned_bytes + bytes > size_t(setting("pinned", 1l << 30))) return OUT_OF_MEMORY;
    *out = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    memset(*out, POISON, bytes);
    s.pinned[uint64_t(*out)] = bytes;
    s.pinned_bytes += bytes;
    s.num_pinned++;
    return SUCCESS;
}

API cuMemFreeHost(void* p) {
    cuCtxSynchronize();
    State& s = state();
    std::lock_guard lock(s.mutex);
    const auto found = s.pinned.find(uint64_t(p));
    if (found == s.pinned.end()) {
        say("cuMemFreeHost", "no pinned memory");
        return INVALID_VALUE;
    }
    s.pinned_bytes -= found->second;
    s.num_unpinned++;
    s.pinned.erase(found);
    free(p);
    return SUCCESS;
}

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* handle) {
    if (int error = ready("cuMemcpyHtoDAsync")) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!is_device("cuMemcpyHtoDAsync", "the target", to, 1)) return INVALID_VALUE;
    // Pageable memory is read before the call returns, pinned memory when the stream comes to it.
    std::shared_ptr<std::vector<unsigned char>> staged;
    if (!is_pinned(from, bytes)) {
        const auto* first = static_cast<const unsigned char*>(from);
        staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
    }
    queue(stream, "cuMemcpyHtoDAsync", [=] {
        check("cuMemcpyHtoDAsync", "the target", to, bytes);
        if (!state().error) memcpy(reinterpret_cast<void*>(to), staged ? staged->data() : from, bytes);
    });
    return SUCCESS;
}

API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* handle) {
    if (int error = ready("cuMemcpyDtoHAsync")) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!is_device("cuMemcpyDtoHAsync", "the source", from, 1)) return INVALID_VALUE;
    queue(stream, "cuMemcpyDtoHAsync", [=] {
        check("cuMemcpyDtoHAsync", "the source", from, bytes);
        if (!state().error) memcpy(to, reinterpret_cast<const void*>(from), bytes);
    });
    return SUCCESS;
}

API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* handle) {
    if (int error = ready("cuMemcpyDtoDAsync")) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    queue(stream, "cuMemcpyDtoDAsync", [=] {
        check("cuMemcpyDtoDAsync", "the source", from, bytes);
        check("cuMemcpyDtoDAsync", "the target", to, bytes);
        if (!state().error) memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    });
    return SUCCESS;
}

API cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void* handle) {
    if (int error = ready("cuMemsetD8Async")) return error;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (bytes == 0) return SUCCESS;
    if (!is_device("cuMemsetD8Async", "the target", at, 1)) return INVALID_VALUE;
    queue(stream, "cuMemsetD8Async", [=] {
        check("cuMemsetD8Async", "the target", at, bytes);
        if (!state().error) memset(reinterpret_cast<void*>(at), value, bytes);
    });
    return SUCCESS;
}

API cuEventCreate(void** event, unsigned) {
    if (int error = ready("cuEventCreate")) return error;
    std::lock_guard lock(state().mutex);
    *event = state().handle();
    state().events[*event] = std::make_shared<Event>();
    return SUCCESS;
}

static std::shared_ptr<Event> event_of(const char* call, void* event) {
    std::lock_guard lock(state().mutex);
    auto found = state().events.find(event);
    if (found != state().events.end()) return found->second;
    say(call, "no event, or one that is destroyed");
    return nullptr;
}

API cuEventRecord(void* handle, void* stream_handle) {
    if (int error = ready("cuEventRecord")) return error;
    auto event = event_of("cuEventRecord", handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    unsigned long number;
    {
        std::lock_guard lock(event->mutex);
        number = ++event->queued;
    }
    queue(stream, "cuEventRecord", [event, number] {
        {
            std::lock_guard lock(event->mutex);
            event->reached = std::max(event->reached, number);
            event->time = std::chrono::steady_clock::now();
        }
        event->changed.notify_all();
    });
    return SUCCESS;
}

API cuEventQuery(void* handle) {
    auto event = event_of("cuEventQuery", handle);
    if (!event) return INVALID_HANDLE;
    if (int error = state().error) return error;
    std::lock_guard lock(event->mutex);
    return event->reached == event->queued ? SUCCESS : NOT_READY;
}

API cuEventSynchronize(void* handle) {
    auto event = event_of("cuEventSynchronize", handle);
    if (!event) return INVALID_HANDLE;
    std::unique_lock lock(event->mutex);
    event->changed.wait(lock, [&] { return event->reached == event->queued; });
    return state().error;
}

API cuEventElapsedTime_v2(float* ms, void* from, void* to) {
    const char* call = "cuEventElapsedTime";
    auto begin = event_of(call, from), end = event_of(call, to);
    if (!begin || !end) return INVALID_HANDLE;
    std::scoped_lock lock(begin->mutex, end->mutex);
    if (!begin->reached || !end->reached) return NOT_READY;
    *ms = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
    return SUCCESS;
}

API cuEventDestroy_v2(void* event) {
    if (!event_of("cuEventDestroy", event)) return INVALID_HANDLE;
    std::lock_guard lock(state().mutex);
    state().events.erase(event);
    return SUCCESS;
}

API cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
    auto event = event_of("cuStreamWaitEvent", handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    unsigned long number;
    {
        std::lock_guard lock(event->mutex);
        number = event->queued;
    }
    queue(stream, "cuStreamWaitEvent", [event, number] {
        std::unique_lock lock(event->mutex);
        event->changed.wait(lock, [&] { return event->reached >= number; });
    });
    return SUCCESS;
}

namespace {

// Whether a fat binary, as nvcc makes it, has code for this GPU: machine code for its generation, or PTX for an earlier one.
bool has_code(const unsigned char* image) {
    const auto word = [](const unsigned char* at, auto value) {
        memcpy(&value, at, sizeof value);
        return value;
    };
    if (word(image, uint32_t{}) != 0xba55ed50) {
        say("cuModuleLoadData", "no fat binary");
        return false;
    }
    const uint32_t own = uint32_t(setting("capability", 90));
    const unsigned char *at = image + word(image + 6, uint16_t{}), *end = at + word(image + 8, uint64_t{});
    while (at < end) {
        const uint16_t kind = word(at, uint16_t{});
        const uint32_t cap = word(at + 28, uint32_t{});
        if (kind == 1 ? cap <= own : cap / 10 == own / 10 && cap <= own) return true;
        at += word(at + 4, uint32_t{}) + word(at + 8, uint64_t{});
    }
    return false;
}

}  // namespace

API cuModuleLoadData(void** module, const void* image) {
    if (int error = ready("cuModuleLoadData")) return error;
    if (!has_code(static_cast<const unsigned char*>(image))) return NO_BINARY;
    // As a driver does that is older than the compiler.
    if (setting("driver", 13000) < 13000) return NO_BINARY;
    std::lock_guard lock(state().mutex);
    *module = state().handle();
    state().modules[*module] = "module";
    return SUCCESS;
}

API cuModuleUnload(void* module) {
    std::lock_guard lock(state().mutex);
    return state().modules.erase(module) ? SUCCESS : INVALID_HANDLE;
}

API cuModuleGetFunction(void** function, void* module, const char* name) {
    if (int error = ready("cuModuleGetFunction")) return error;
    std::lock_guard lock(state().mutex);
    if (!state().modules.count(module)) return INVALID_HANDLE;
    if (!host_types(name)) return NOT_FOUND;
    *function = state().handle();
    state().functions[*function] = name;
    return SUCCESS;
}

API cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
    std::lock_guard lock(state().mutex);
    const auto found = state().functions.find(function);
    if (found == state().functions.end()) return INVALID_HANDLE;
    const std::string types = host_types(found->second.c_str());
    if (index >= types.size()) return INVALID_VALUE;
    *offset = 0;
    for (size_t i = 0; i <= index; i++) {
        *bytes = types[i] == 'p' || types[i] == 'l' ? 8 : 4;
        *offset = (*offset + *bytes - 1) / *bytes * *bytes;
        if (i < index) *offset += *bytes;
    }
    return SUCCESS;
}

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared_bytes,
                   void* stream_handle, void** args, void** extra) {
    if (int error = ready("cuLaunchKernel")) return error;
    State& s = state();
    // The name outlives the work: functions are never forgotten.
    const char* name;
    long number;
    {
        std::lock_guard lock(s.mutex);
        auto found = s.functions.find(function);
        if (found == s.functions.end()) return INVALID_HANDLE;
        name = found->second.c_str();
        number = ++s.num_launches;
    }
    Stream* stream = stream_of(stream_handle);
    if (!stream) return INVALID_HANDLE;
    const auto wrong = [&](const char* what) {
        say(name, what);
        return int(INVALID_VALUE);
    };
    if (extra) return wrong("extra arguments");
    if (!gx || !gy || !gz || !bx || !by || !bz) return wrong("a grid or block of no threads");
    if (gx > 0x7fffffffu || gy > 65535 || gz > 65535) return wrong("a grid over the limit of 2147483647 x 65535 x 65535 blocks");
    if (uint64_t(bx) * by * bz > 1024) return wrong("a block of more than 1024 threads");
    if (shared_bytes > 48 * 1024) return wrong("more than 48 KiB of shared memory");
    const char* types = host_types(name);
    // Arguments are copied before the call returns, as the driver does.
    auto values = std::make_shared<std::vector<uint64_t>>();
    for (const char* type = types; *type; type++) {
        const size_t bytes = *type == 'p' || *type == 'l' ? 8 : 4;
        uint64_t value = 0;
        memcpy(&value, args[type - types], bytes);
        values->push_back(value);
    }
    const bool is_faulty = number == setting("fault", 0);
    const unsigned seed = unsigned(setting("seed", 1)) * 1000003u + unsigned(number);
    queue(stream, name, [=] {
        if (is_faulty) return spoil(name, "an illegal address, as the test wants it");
        if (state().error) return;
        std::vector<void*> pointers;
        for (uint64_t& value : *values) pointers.push_back(&value);
        for (size_t i = 0; types[i]; i++)
            if (types[i] == 'p' && (*values)[i]) check(name, ("argument " + std::to_string(i)).c_str(), (*values)[i], 1);
        if (state().error) return;
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        if (const char* error = host_launch(name, grid, block, shared_bytes, types, pointers.data(), seed)) spoil(name, error);
    });
    return SUCCESS;
}
