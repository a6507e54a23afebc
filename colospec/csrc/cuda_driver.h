/* The functions of libcuda that a ring in GPU memory needs, loaded at first use: the build needs no
 * CUDA toolkit and the import no GPU. Types have the sizes of the driver's ABI.
 */
#ifndef COLOSPEC_CUDA_DRIVER_H
#define COLOSPEC_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef struct CUstream_st *cu_stream;
typedef uint64_t cu_pointer;
typedef int cu_device;
typedef struct {
    char bytes[64];
} cu_ipc_handle;

/* X(name in our table, symbol of libcuda, parameters); every function returns a CUresult. */
#define CUDA_DRIVER_FUNCTIONS(X)                                                                   \
    X(get_error_string, cuGetErrorString, (int result, const char **text))                         \
    X(get_current_device, cuCtxGetDevice, (cu_device * device))                                    \
    X(get_device_attribute, cuDeviceGetAttribute, (int *value, int attribute, cu_device device))   \
    X(alloc_memory, cuMemAlloc_v2, (cu_pointer * pointer, size_t nbytes))                          \
    X(free_memory, cuMemFree_v2, (cu_pointer pointer))                                             \
    X(get_ipc_handle, cuIpcGetMemHandle, (cu_ipc_handle * handle, cu_pointer pointer))             \
    X(open_ipc_handle, cuIpcOpenMemHandle_v2,                                                      \
      (cu_pointer * pointer, cu_ipc_handle handle, unsigned flags))                                \
    X(close_ipc_handle, cuIpcCloseMemHandle, (cu_pointer pointer))                                 \
    X(register_host, cuMemHostRegister_v2, (void *host, size_t nbytes, unsigned flags))            \
    X(unregister_host, cuMemHostUnregister, (void *host))                                          \
    X(get_host_pointer, cuMemHostGetDevicePointer_v2,                                              \
      (cu_pointer * pointer, void *host, unsigned flags))                                          \
    X(stream_write_u64, cuStreamWriteValue64_v2,                                                   \
      (cu_stream stream, cu_pointer address, uint64_t value, unsigned flags))                      \
    X(launch_host_function, cuLaunchHostFunc,                                                      \
      (cu_stream stream, void (*function)(void *), void *data))

extern struct cuda_driver {
#define DECLARE(name, symbol, parameters) int(*name) parameters;
    CUDA_DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
} cuda_driver;

/* Fill in cuda_driver, under the GIL. Returns NULL, or a static text that says why not. */
const char *load_cuda_driver(void);

#endif
