// libnccl of the stand-in, for ranks that are threads of one process.
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "numbers.h"
#include "state.h"

namespace stand_in {
namespace {

enum { SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };
constexpr const char* KIND = "NCCL communicator";

// What a rank gives to an operation.
struct Given {
    std::string call;
    const void* from = nullptr;
    size_t count = 0;
    int type = 0, root = 0;
};

// Ranks that found each other.
struct Group {
    std::mutex mutex;
    std::condition_variable changed;
    size_t size = 0, joined = 0;
    std::vector<void*> contexts;
    bool is_aborted = false;
    // Of the operation under way: what each rank gave, how many have given and taken, its number.
    std::vector<Given> given;
    size_t num_given = 0, num_taken = 0, number = 0;
};

struct Communicator {
    std::shared_ptr<Group> group;
    size_t rank = 0;
    void* context = nullptr;
};

struct Operation {
    Communicator communicator;
    Given given;
    void* to;
    Stream* stream;
};

std::mutex mutex;
std::map<std::string, std::shared_ptr<Group>> groups;
std::map<void*, Communicator> communicators;
thread_local int depth = 0;
thread_local std::vector<Operation> waiting;

constexpr int FLOAT32 = 7, BFLOAT16 = 9;

Element element_of(int type) { return type == BFLOAT16 ? Element::BF16 : Element::F32; }

// Does an operation together with the other ranks, on the stream's thread. What one rank writes may be what another
// reads, so all results are there before the first is written.
void run(const Operation& operation) {
    Group& group = *operation.communicator.group;
    const Given& mine = operation.given;
    const char* call = mine.call.c_str();
    const size_t rank = operation.communicator.rank, size = group.size, count = mine.count;
    const Element element = element_of(mine.type);
    const size_t bytes = bytes_of(element);
    const bool scatters = mine.call == "ncclReduceScatter", gathers = mine.call == "ncclAllGather";
    const size_t num_read = scatters ? size * count : count, num_written = gathers ? size * count : count;
    check(call, "what is sent", uint64_t(mine.from), num_read * bytes);
    check(call, "what is received", uint64_t(operation.to), num_written * bytes);
    std::vector<unsigned char> result(num_written * bytes);
    std::unique_lock lock(group.mutex);
    // The ranks have taken what the operation before gave.
    group.changed.wait(lock, [&] { return group.is_aborted || group.num_taken == 0; });
    if (group.is_aborted) return;
    const size_t number = group.number;
    group.given[rank] = mine;
    if (++group.num_given == size) group.number++;
    group.changed.notify_all();
    group.changed.wait(lock, [&] { return group.is_aborted || group.number != number; });
    if (group.is_aborted) return;
    for (size_t other = 0; other < size; other++) {
        const Given& theirs = group.given[other];
        if (theirs.call != mine.call || theirs.count != count || theirs.type != mine.type || theirs.root != mine.root) {
            spoil(call, "rank " + std::to_string(rank) + " has " + std::to_string(count) + " elements, rank " + std::to_string(other) + " " +
                            theirs.call + " of " + std::to_string(theirs.count));
            group.is_aborted = true;
            group.changed.notify_all();
            return;
        }
    }
    if (gathers) {
        for (size_t other = 0; other < size; other++) memcpy(&result[other * count * bytes], group.given[other].from, count * bytes);
    } else if (mine.call == "ncclBroadcast") {
        memcpy(result.data(), group.given[size_t(mine.root)].from, count * bytes);
    } else {
        const size_t first = scatters ? rank * count : 0;
        for (size_t i = 0; i < count; i++) {
            float sum = 0.f;
            for (size_t other = 0; other < size; other++) sum += get(group.given[other].from, first + i, element);
            set(result.data(), i, element, sum);
        }
    }
    if (++group.num_taken == size) group.num_given = 0;
    group.changed.notify_all();
    group.changed.wait(lock, [&] { return group.is_aborted || group.num_given == 0; });
    memcpy(operation.to, result.data(), result.size());
    if (--group.num_taken == 0) group.changed.notify_all();
}

// Queues the operations that were called for, unless a group is open.
void queue_waiting() {
    if (depth > 0) return;
    for (const Operation& each : waiting) queue(each.stream, "NCCL", [each] { run(each); });
    waiting.clear();
}

int begin(const char* call, const void* from, void* to, size_t count, int type, int operation, int root, void* handle, void* stream_handle) {
    const auto wrong = [&](const char* what) {
        say(call, what);
        return int(INVALID_ARGUMENT);
    };
    if (!is_alive(call, KIND, handle)) return INVALID_ARGUMENT;
    if (ready(call)) return 1;
    Operation queued;
    {
        std::lock_guard lock(mutex);
        queued.communicator = communicators[handle];
    }
    const size_t size = queued.communicator.group->size;
    if (type != FLOAT32 && type != BFLOAT16) return wrong("a type that is not known here");
    const size_t bytes = bytes_of(element_of(type));
    if (operation != 0) return wrong("an operation that is not known here");
    if (root < 0 || size_t(root) >= size) return wrong("no such rank");
    if (current_context() != queued.communicator.context) return wrong("the current GPU is not the communicator's");
    queued.stream = stream_of(stream_handle);
    if (!queued.stream) return wrong("no stream, or one that is destroyed");
    if (count == 0) return 0;
    if (!is_device(call, "what is sent", uint64_t(from), bytes) || !is_device(call, "what is received", uint64_t(to), bytes))
        return INVALID_ARGUMENT;
    // A sum, and the first rank's numbers, may replace what was given.
    if (from == to && (!strcmp(call, "ncclReduceScatter") || !strcmp(call, "ncclAllGather"))) return wrong("in place, which is another place for each rank");
    queued.given = {call, from, count, type, root};
    queued.to = to;
    waiting.push_back(queued);
    queue_waiting();
    return 0;
}

}  // namespace
}  // namespace stand_in

using namespace stand_in;

#define API extern "C" __attribute__((visibility("default"))) int

struct UniqueId {
    char bytes[128];
};

API ncclGetVersion(int* version) {
    *version = int(setting("nccl", 22803));
    return 0;
}

API ncclGetUniqueId(UniqueId* id) {
    static int next = 0;
    std::lock_guard lock(mutex);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "%d of process %d", ++next, int(getpid()));
    groups[id->bytes] = std::make_shared<Group>();
    return 0;
}

API ncclCommInitRank(void** out, int size, UniqueId id, int rank) {
    const char* call = "ncclCommInitRank";
    if (ready(call)) return 1;
    std::shared_ptr<Group> group;
    {
        std::lock_guard lock(mutex);
        const auto found = groups.find(std::string(id.bytes, strnlen(id.bytes, sizeof id.bytes)));
        if (found == groups.end()) {
            say(call, "an id of another process: ranks are threads here");
            return SYSTEM_ERROR;
        }
        group = found->second;
    }
    if (size < 1 || rank < 0 || rank >= size) {
        say(call, "no such rank");
        return INVALID_ARGUMENT;
    }
    {
        std::unique_lock lock(group->mutex);
        group->size = size_t(size);
        group->given.resize(size_t(size));
        group->contexts.push_back(current_context());
        group->joined++;
        group->changed.notify_all();
        group->changed.wait(lock, [&] { return group->joined >= group->size; });
        for (size_t i = 0; i < group->contexts.size(); i++)
            for (size_t j = 0; j < i; j++)
                if (group->contexts[i] == group->contexts[j]) {
                    say(call, "two ranks on one GPU");
                    return INVALID_USAGE;
                }
    }
    *out = born(KIND);
    std::lock_guard lock(mutex);
    communicators[*out] = {group, size_t(rank), current_context()};
    return 0;
}

static int end(const char* call, void* handle, bool aborts) {
    if (!dies(call, KIND, handle)) return INVALID_ARGUMENT;
    std::lock_guard lock(mutex);
    std::shared_ptr<Group> group = communicators[handle].group;
    communicators.erase(handle);
    if (!aborts) return 0;
    std::lock_guard of_group(group->mutex);
    group->is_aborted = true;
    group->changed.notify_all();
    return 0;
}

API ncclCommDestroy(void* handle) { return end("ncclCommDestroy", handle, false); }

API ncclCommAbort(void* handle) { return end("ncclCommAbort", handle, true); }

API ncclCommGetAsyncError(void* handle, int* error) {
    if (!is_alive("ncclCommGetAsyncError", KIND, handle)) return INVALID_ARGUMENT;
    *error = 0;
    return 0;
}

API ncclGroupStart() {
    depth++;
    return 0;
}

API ncclGroupEnd() {
    if (depth == 0) {
        say("ncclGroupEnd", "no group was begun");
        return INVALID_USAGE;
    }
    depth--;
    queue_waiting();
    return 0;
}

API ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, void* communicator, void* stream) {
    return begin("ncclAllReduce", from, to, count, type, operation, 0, communicator, stream);
}

API ncclReduceScatter(const void* from, void* to, size_t count, int type, int operation, void* communicator, void* stream) {
    return begin("ncclReduceScatter", from, to, count, type, operation, 0, communicator, stream);
}

API ncclAllGather(const void* from, void* to, size_t count, int type, void* communicator, void* stream) {
    return begin("ncclAllGather", from, to, count, type, 0, 0, communicator, stream);
}

API ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* communicator, void* stream) {
    return begin("ncclBroadcast", from, to, count, type, 0, root, communicator, stream);
}
