/* SPDX-License-Identifier: Apache-2.0 */
/* A CUDA runtime in host memory, for tests of the ctypes layer: the functions that shadowc calls, with the
   prototypes of cuda_runtime_api.h. What is there, and what fails, is set by variables of the environment
   when it is loaded. */
#include <stdlib.h>
#include <string.h>

typedef int error;
typedef void* stream;
enum { kMemory = 2, kInvalid = 1, kMost = 64 };

static size_t free_bytes = 1 << 24;
static int capturing, copies, next_event;
static struct {
  void* to;
  const void* from;
  size_t to_pitch, from_pitch, width, rows;
} recorded[kMost];

static int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

error cudaGetDeviceCount(int* count) {
  *count = setting("FAKE_DEVICES", 1);
  return setting("FAKE_STATUS", 0);
}
error cudaSetDevice(int device) { return device == 0 ? setting("FAKE_SET", 0) : kInvalid; }
error cudaDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 6 : -1;
  return device == 0 ? 0 : kInvalid;
}
error cudaGetDeviceProperties(void* properties, int device) {
  memset(properties, 0, 1024);
  strcpy(properties, "Fake GPU");
  return device ? kInvalid : setting("FAKE_PROPERTIES", 0);
}
error cudaDriverGetVersion(int* version) { return *version = setting("FAKE_DRIVER", 13000), 0; }
error cudaRuntimeGetVersion(int* version) { return *version = 13040, 0; }
error cudaMemGetInfo(size_t* free, size_t* total) { return *free = free_bytes, *total = 1 << 24, 0; }
error cudaMalloc(void** address, size_t size) {
  if (size > free_bytes) return kMemory;
  free_bytes -= size;
  return posix_memalign(address, 256, size) ? kMemory : (memset(*address, 0xFF, size), 0);
}
error cudaFree(void* address) { return free(address), 0; }
error cudaHostAlloc(void** address, size_t size, unsigned flags) {
  if (setting("FAKE_PINNED", 0)) return setting("FAKE_PINNED", 0);
  return flags ? kInvalid : posix_memalign(address, 256, size) ? kMemory : 0;
}
error cudaFreeHost(void* address) { return free(address), 0; }

static error copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
  if (width > to_pitch || width > from_pitch) return kInvalid;
  if (capturing && copies < kMost) {
    recorded[copies].to = to, recorded[copies].from = from, recorded[copies].to_pitch = to_pitch;
    recorded[copies].from_pitch = from_pitch, recorded[copies].width = width, recorded[copies++].rows = rows;
    return 0;
  }
  for (size_t row = 0; row < rows; ++row)
    memcpy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return 0;
}
error cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, stream s) {
  return s && kind >= 1 && kind <= 3 ? copy(to, size, from, size, size, 1) : kInvalid;
}
error cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                        size_t rows, int kind, stream s) {
  return s && kind == 3 ? copy(to, to_pitch, from, from_pitch, width, rows) : kInvalid;
}
error cudaStreamCreateWithFlags(stream* s, unsigned flags) {
  return *s = (void*)0x5EA, flags == 1 ? setting("FAKE_STREAM", 0) : kInvalid;
}
error cudaStreamSynchronize(stream s) { return capturing ? 900 : s ? setting("FAKE_RUN", 0) : kInvalid; }
error cudaStreamDestroy(stream s) { return s ? 0 : kInvalid; }
error cudaStreamBeginCapture(stream s, int mode) {
  return capturing = 1, copies = 0, s && mode == 1 ? 0 : kInvalid;
}
error cudaStreamEndCapture(stream s, void** graph) {
  return capturing = 0, *graph = (void*)0x6A9, s ? setting("FAKE_CAPTURE", 0) : kInvalid;
}
error cudaGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  return *executable = (void*)0xE8E, graph && !flags ? 0 : kInvalid;
}
error cudaGraphLaunch(void* executable, stream s) {
  if (executable != (void*)0xE8E || !s) return kInvalid;
  for (int i = 0; i < copies; ++i)
    copy(recorded[i].to, recorded[i].to_pitch, recorded[i].from, recorded[i].from_pitch, recorded[i].width,
         recorded[i].rows);
  return 0;
}
error cudaGraphExecDestroy(void* executable) { return executable == (void*)0xE8E ? 0 : kInvalid; }
error cudaGraphDestroy(void* graph) { return graph == (void*)0x6A9 ? 0 : kInvalid; }
error cudaEventCreateWithFlags(void** event, unsigned flags) {
  return *event = (void*)(size_t)++next_event, (int)flags;
}
error cudaEventRecord(void* event, stream s) { return event && s ? 0 : kInvalid; }
error cudaEventSynchronize(void* event) { return event ? 0 : kInvalid; }
error cudaEventElapsedTime(float* milliseconds, void* first, void* second) {
  return *milliseconds = (float)((size_t)second - (size_t)first), 0;
}
error cudaGetLastError(void) { return 0; }
const char* cudaGetErrorName(error status) {
  return status == 900 ? "cudaErrorStreamCaptureUnsupported" : "cudaErrorFake";
}
const char* cudaGetErrorString(error status) {
  return status == 900 ? "not while capturing" : "as it was told to";
}
