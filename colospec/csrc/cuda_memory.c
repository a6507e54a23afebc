/* Memory for a ring between two processes of one GPU; see cuda_memory.h. */
#include "cuda_memory.h"

#include <string.h>

enum {
    ENABLE_PEER_ACCESS = 1,      /* CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS */
    PORTABLE_AND_MAPPED = 1 | 2, /* CU_MEMHOSTREGISTER_ */
    CAN_WRITE_64_BITS = 122,     /* CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS */
    PAGE_BYTES = 4096,
};

PyObject *raise_cuda_error(const char *what, int result) {
    const char *text = NULL;
    cuda_driver.get_error_string(result, &text);
    PyObject *kind = result == CUDA_OUT_OF_MEMORY ? PyExc_MemoryError : PyExc_RuntimeError;
    return PyErr_Format(kind, "%s failed: %s (CUDA error %d)", what, text ? text : "unknown",
                        result);
}

/* Load the driver and call it; from the function that uses this, NULL is returned with an error. */
#define CALL(name, ...)                                                                            \
    do {                                                                                           \
        const char *missing = load_cuda_driver();                                                  \
        if (missing != NULL)                                                                       \
            return PyErr_Format(PyExc_RuntimeError, "%s", missing);                                \
        PyThreadState *thread = PyEval_SaveThread(); /* it may wait for the device */              \
        int result = cuda_driver.name(__VA_ARGS__);                                                \
        PyEval_RestoreThread(thread);                                                              \
        if (result != 0)                                                                           \
            return raise_cuda_error(#name, result);                                                \
    } while (0)

static PyObject *cuda_driver_error(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    const char *error = load_cuda_driver();
    return error ? PyUnicode_DecodeLocale(error, "surrogateescape") : Py_NewRef(Py_None);
}

static PyObject *gpu_alloc(PyObject *Py_UNUSED(module), PyObject *number) {
    size_t nbytes = PyLong_AsSize_t(number);
    cu_pointer pointer = 0;
    if (PyErr_Occurred())
        return NULL;
    CALL(alloc_memory, &pointer, nbytes);
    return PyLong_FromUnsignedLongLong(pointer);
}

static PyObject *gpu_export(PyObject *Py_UNUSED(module), PyObject *number) {
    cu_ipc_handle handle;
    cu_pointer pointer = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    CALL(get_ipc_handle, &handle, pointer);
    return PyBytes_FromStringAndSize(handle.bytes, sizeof handle.bytes);
}

static PyObject *gpu_open(PyObject *Py_UNUSED(module), PyObject *bytes) {
    cu_ipc_handle handle;
    cu_pointer pointer = 0;
    char *text;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(bytes, &text, &length) < 0)
        return NULL;
    if (length != sizeof handle)
        return PyErr_Format(PyExc_ValueError, "an IPC handle of %zd bytes", length);
    memcpy(&handle, text, sizeof handle);
    CALL(open_ipc_handle, &pointer, handle, ENABLE_PEER_ACCESS);
    return PyLong_FromUnsignedLongLong(pointer);
}

static PyObject *gpu_close(PyObject *Py_UNUSED(module), PyObject *number) {
    cu_pointer pointer = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    CALL(close_ipc_handle, pointer);
    Py_RETURN_NONE;
}

static PyObject *gpu_free(PyObject *Py_UNUSED(module), PyObject *number) {
    cu_pointer pointer = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    CALL(free_memory, pointer);
    Py_RETURN_NONE;
}

/* The whole pages of a mapping; the caller keeps it until host_unregister. */
static PyObject *host_register(PyObject *Py_UNUSED(module), PyObject *memory) {
    Py_buffer view;
    cu_pointer pointer = 0;
    if (PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE) < 0)
        return NULL;
    void *start = view.buf;
    size_t nbytes = ((size_t)view.len + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    PyBuffer_Release(&view);
    CALL(register_host, start, nbytes, PORTABLE_AND_MAPPED);
    int result = cuda_driver.get_host_pointer(&pointer, start, 0);
    if (result == 0)
        return PyLong_FromUnsignedLongLong(pointer);
    cuda_driver.unregister_host(start);
    return raise_cuda_error("get_host_pointer", result);
}

static PyObject *host_unregister(PyObject *Py_UNUSED(module), PyObject *memory) {
    Py_buffer view;
    if (PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE) < 0)
        return NULL;
    void *start = view.buf;
    PyBuffer_Release(&view);
    CALL(unregister_host, start);
    Py_RETURN_NONE;
}

static PyObject *can_write_from_stream(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    cu_device device;
    int can = 0;
    CALL(get_current_device, &device);
    CALL(get_device_attribute, &can, CAN_WRITE_64_BITS, device);
    return PyBool_FromLong(can);
}

PyMethodDef cuda_memory_methods[] = {
    {"cuda_driver_error", cuda_driver_error, METH_NOARGS, "None if libcuda works, or why not"},
    {"gpu_alloc", gpu_alloc, METH_O, "gpu_alloc(nbytes) -> pointer"},
    {"gpu_export", gpu_export, METH_O, "gpu_export(pointer) -> IPC handle, for gpu_open"},
    {"gpu_open", gpu_open, METH_O, "gpu_open(handle) -> pointer, in another process"},
    {"gpu_close", gpu_close, METH_O, "gpu_close(pointer of gpu_open)"},
    {"gpu_free", gpu_free, METH_O, "gpu_free(pointer of gpu_alloc)"},
    {"host_register", host_register, METH_O, "host_register(mapping) -> its pointer for the GPU"},
    {"host_unregister", host_unregister, METH_O, "host_unregister(mapping)"},
    {"can_write_from_stream", can_write_from_stream, METH_NOARGS, "() -> bool"},
    {NULL, NULL, 0, NULL},
};
