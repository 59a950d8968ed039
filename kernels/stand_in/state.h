// A GPU that is not there: libcuda, libcublas, libcudnn and libnccl of which one library is the stand-in, as far as
// this project calls them. Kernels run by their host build, streams are threads that work off their queues late,
// memory ends at a guard page. What a GPU refuses is refused here, with the name of the call.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>

namespace stand_in {

// Settings, from the variable MASKINV_STAND_IN: words `name=number` between commas.
//
// devices      GPUs there are (1)
// capability   compute capability times ten (90)
// driver       version as cuDriverGetVersion has it (13000)
// oom          number of the allocation that fails, from 1 (0: none)
// fault        number of the kernel that touches an illegal address, from 1 (0: none)
// lag          greatest time in microseconds that a stream waits before a piece of work (50)
// seed         of the waits, and of the order of the threads (1)
// cudnn        version as cudnnGetVersion has it (90100)
// nccl         version as ncclGetVersion has it (22803)
// memory       bytes of a device (8 GiB)
// pinned       bytes of page-locked memory there are (1 GiB)
// unsupported  number of the convolution that is refused as not supported after a search offered it, from 1 (0: none)
// ways         algorithms that a search offers at most (all)
// counts       1 to say at the end how often memory was allocated and freed
long setting(const char* name, long otherwise);

// Says what is wrong on standard error, for the tests to find: "stand-in: CALL: WHAT".
void say(const char* call, const std::string& what);

// Numbers are the driver's, cuBLAS's and cuDNN's own.
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
       INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, NO_BINARY = 209, NO_DEVICE = 100 };

struct Stream;

// The stream of a handle; the default stream for null. Null if there is no such stream.
Stream* stream_of(void* handle);
// Queues work on a stream; `name` is that of the call, for messages.
void queue(Stream* stream, const char* name, std::function<void()> work);
// Waits until a stream has worked off its queue.
void drain(Stream* stream);
// Whether the calling thread has a current context, and no earlier error is left.
int ready(const char* call);
// The calling thread's context.
void* current_context();
// Ends the device's life as an illegal address does: all later calls fail.
void spoil(const char* call, const std::string& what);

// Checks, when work runs, that the bytes lie in memory that is allocated.
void check(const char* call, const char* name, uint64_t address, size_t bytes);
// Checks when a call is made that an address lies in device memory with this alignment; false after saying so.
bool is_device(const char* call, const char* name, uint64_t address, size_t alignment);

// Objects with a lifetime: handles and descriptors. `kind` is a word for messages.
void* born(const char* kind);
bool is_alive(const char* call, const char* kind, const void* object);
bool dies(const char* call, const char* kind, const void* object);

}  // namespace stand_in
