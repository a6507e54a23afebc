/* colospec._ring: the Python face of ring.c. One object is one side of one ring.
 *
 * Results are statuses, not exceptions: colospec.ring.link turns them into errors that carry the
 * state of both sides. Only misuse raises here (ValueError).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "cuda_memory.h"
#include "ring.h"

static const uint64_t SIGNAL_CHECK_NS = 50 * 1000 * 1000;

typedef struct {
    PyObject_HEAD Py_buffer memory; /* keeps the mapping alive */
    struct ring_end end;
    cu_pointer counter; /* where streams find this side's counter; 0: the host writes it */
    bool by_callback;   /* the device has no stream memory writes */
} Ring;

/* One counter's way through a stream. */
struct stream_store {
    const Ring *ring;
    cu_stream stream;
    int error; /* a CUresult */
};

struct host_store {
    _Atomic uint64_t *counter;
    uint64_t value;
};

/* Runs on a thread of the driver, after the stream's work. */
static void store_from_host(void *data) {
    struct host_store *work = data;
    atomic_store_explicit(work->counter, work->value, memory_order_release);
    free(work);
}

static bool store_from_stream(void *context, _Atomic uint64_t *counter, uint64_t value) {
    struct stream_store *store = context;
    if (!store->ring->by_callback) {
        /* Flags 0: a fence before the write orders it after all that the stream has written. */
        store->error = cuda_driver.stream_write_u64(store->stream, store->ring->counter, value, 0);
        return store->error == 0;
    }
    struct host_store *work = malloc(sizeof *work);
    if (work == NULL)
        return (store->error = CUDA_OUT_OF_MEMORY) == 0;
    *work = (struct host_store){counter, value};
    store->error = cuda_driver.launch_host_function(store->stream, store_from_host, work);
    if (store->error != 0)
        free(work);
    return store->error == 0;
}

static PyObject *new_ring(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *memory;
    unsigned long long num_slots, start_seq;
    const char *label;
    Py_ssize_t length;
    int is_writer;
    if (!PyArg_ParseTuple(args, "OpKKy#", &memory, &is_writer, &num_slots, &start_seq, &label,
                          &length))
        return NULL;
    if (length > RING_LABEL_BYTES)
        return PyErr_Format(PyExc_ValueError, "label of %zd bytes", length);
    struct ring_geometry geometry = {.num_slots = num_slots, .start_seq = start_seq};
    memcpy(geometry.label, label, (size_t)length);
    Ring *self = (Ring *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        return NULL;
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) == 0) {
        const char *fault =
            ring_open(&self->end, self->memory.buf, (size_t)self->memory.len, is_writer, &geometry);
        if (fault == NULL)
            return (PyObject *)self;
        PyErr_Format(PyExc_ValueError, "the ring's control block is damaged or foreign: %s", fault);
    }
    Py_DECREF(self);
    return NULL;
}

static void dealloc_ring(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    PyBuffer_Release(&((Ring *)object)->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* Waits without the GIL, in pieces short enough for Ctrl-C. */
static PyObject *wait(PyObject *object, PyObject *args) {
    struct ring_end *end = &((Ring *)object)->end;
    enum ring_status status;
    unsigned long long held = 0;
    double timeout_s;
    if (!PyArg_ParseTuple(args, "d|Ki", &timeout_s, &held, &end->peer_fd))
        return NULL;
    if (!(timeout_s >= 0 && timeout_s < 1e9) || held > end->taken - end->released)
        return PyErr_Format(PyExc_ValueError, "timeout_s must be in [0, 1e9); held is %llu", held);
    /* A slot that an interrupted caller never got is not held, and handed out again. */
    end->taken = end->released + held;
    ring_set_phase(end, RING_WAITING);
    uint64_t piece_ns, deadline_ns = ring_now_ns() + (uint64_t)(timeout_s * 1e9);
    do {
        piece_ns = ring_now_ns() + SIGNAL_CHECK_NS;
        PyThreadState *thread = PyEval_SaveThread();
        status = ring_wait(end, piece_ns < deadline_ns ? piece_ns : deadline_ns);
        PyEval_RestoreThread(thread);
    } while (PyErr_CheckSignals() == 0 && status == RING_AGAIN && piece_ns < deadline_ns);
    ring_set_phase(end, status == RING_READY ? RING_HOLDING : RING_WORKING);
    if (PyErr_Occurred())
        return NULL;
    if (status == RING_READY)
        return Py_BuildValue("iIy#", status,
                             ring_slot_of(end, end->is_writer ? end->published : end->taken - 1),
                             end->header.note, (Py_ssize_t)RING_NOTE_BYTES);
    return Py_BuildValue("iIy#", status, 0, end->record.text, (Py_ssize_t)end->record.length);
}

/* The last argument of publish and release: a stream where the ring has use_streams, else none. */
static bool parse_store(PyObject *object, PyObject *args, unsigned long long stream,
                        struct stream_store *store) {
    const Ring *self = (const Ring *)object;
    *store = (struct stream_store){.ring = self, .stream = (cu_stream)(uintptr_t)stream};
    if ((self->counter != 0) == (PyTuple_Size(args) == 2))
        return true;
    PyErr_SetString(PyExc_ValueError, "a stream is needed after use_streams, and only then");
    return false;
}

static PyObject *status_of(enum ring_status status, const struct stream_store *store) {
    if (store->error != 0)
        return raise_cuda_error("writing a ring's counter from a stream", store->error);
    return PyLong_FromLong(status);
}

static PyObject *publish(PyObject *object, PyObject *args) {
    struct ring_end *end = &((Ring *)object)->end;
    struct stream_store store;
    const char *note;
    Py_ssize_t length;
    unsigned long long stream = 0;
    if (!PyArg_ParseTuple(args, "y#|K", &note, &length, &stream) ||
        !parse_store(object, args, stream, &store))
        return NULL;
    if (!end->is_writer || end->has_left || length != RING_NOTE_BYTES ||
        end->published - end->released >= end->geometry.num_slots)
        return PyErr_Format(PyExc_ValueError, "no free slot for a note of %zd bytes", length);
    PyThreadState *thread = PyEval_SaveThread(); /* a full stream makes its callers wait */
    enum ring_status status =
        ring_publish(end, note, store.ring->counter ? store_from_stream : NULL, &store);
    PyEval_RestoreThread(thread);
    ring_set_phase(end, RING_WORKING);
    return status_of(status, &store);
}

static PyObject *release(PyObject *object, PyObject *args) {
    struct ring_end *end = &((Ring *)object)->end;
    struct stream_store store;
    unsigned long long count, stream = 0;
    if (!PyArg_ParseTuple(args, "K|K", &count, &stream) ||
        !parse_store(object, args, stream, &store))
        return NULL;
    if (end->is_writer || end->has_left || count > end->taken - end->released)
        return PyErr_Format(PyExc_ValueError, "%llu slots to release, not so many taken", count);
    PyThreadState *thread = PyEval_SaveThread();
    enum ring_status status =
        ring_advance(end, count, store.ring->counter ? store_from_stream : NULL, &store);
    PyEval_RestoreThread(thread);
    if (end->taken == end->released)
        ring_set_phase(end, RING_WORKING);
    return status_of(status, &store);
}

/* `control`: the control block's address for the GPU. From now on streams write our counter. */
static PyObject *use_streams(PyObject *object, PyObject *args) {
    Ring *self = (Ring *)object;
    unsigned long long control;
    int by_callback;
    const char *error = load_cuda_driver();
    if (!PyArg_ParseTuple(args, "Kp", &control, &by_callback))
        return NULL;
    if (error != NULL)
        return PyErr_Format(PyExc_RuntimeError, "%s", error);
    const char *counter = (const char *)&self->end.own->counter;
    self->counter = control + (uint64_t)(counter - (const char *)self->end.control);
    self->by_callback = by_callback;
    Py_RETURN_NONE;
}

static PyObject *leave(PyObject *object, PyObject *args) {
    struct ring_end *end = &((Ring *)object)->end;
    int kind;
    const char *text;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "iy#", &kind, &text, &length))
        return NULL;
    if (length > RING_TEXT_BYTES || kind < RING_END || kind > RING_CLOSED ||
        (kind == RING_CLOSED) == end->is_writer)
        return PyErr_Format(PyExc_ValueError, "record %d of %zd bytes", kind, length);
    ring_leave(end, (enum ring_status)kind, text, (size_t)length);
    Py_RETURN_NONE;
}

static PyObject *state(PyObject *object, PyObject *Py_UNUSED(ignored)) {
    struct ring_control *control = ((Ring *)object)->end.control;
    uint64_t start = ((Ring *)object)->end.geometry.start_seq;
    return Py_BuildValue(
        "KK(KKK)(KKK)", atomic_load(&control->writer.counter) - start,
        atomic_load(&control->reader.counter) - start, atomic_load(&control->writer.phase),
        atomic_load(&control->writer.since_ns), atomic_load(&control->writer.wait_ns),
        atomic_load(&control->reader.phase), atomic_load(&control->reader.since_ns),
        atomic_load(&control->reader.wait_ns));
}

static PyMethodDef ring_methods[] = {
    {"wait", wait, METH_VARARGS, "wait(timeout_s, held, peer_fd) -> (status, slot, note or text)"},
    {"publish", publish, METH_VARARGS, "publish(note[, stream]) -> status"},
    {"release", release, METH_VARARGS, "release(count[, stream]) -> status, of the oldest taken"},
    {"use_streams", use_streams, METH_VARARGS, "use_streams(control, by_callback)"},
    {"leave", leave, METH_VARARGS, "leave(kind, text): write END, ERROR or CLOSED"},
    {"state", state, METH_NOARGS, "state() -> (published, released, writer, reader)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "One side of a ring: Ring(memory, is_writer, num_slots, start_seq, label)."},
    {Py_tp_new, new_ring},
    {Py_tp_dealloc, dealloc_ring},
    {Py_tp_methods, ring_methods},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "colospec._ring.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ring_slots,
};

#define CONSTANTS(X)                                                                               \
    X(READY)                                                                                       \
    X(AGAIN)                                                                                       \
    X(DEAD)                                                                                        \
    X(CORRUPT)                                                                                     \
    X(END) X(ERROR) X(CLOSED) X(LABEL_BYTES) X(TEXT_BYTES) X(CONTROL_BYTES) X(HEADER_BYTES)

static int exec_module(PyObject *module) {
#define ADD(name)                                                                                  \
    if (PyModule_AddIntConstant(module, #name, RING_##name) < 0)                                   \
        return -1;
    CONSTANTS(ADD)
#undef ADD
    PyObject *type = PyType_FromSpec(&ring_spec);
    int result = type == NULL ? -1 : PyModule_AddObjectRef(module, "Ring", type);
    Py_XDECREF(type);
    return result;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, exec_module}, {0, NULL}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "colospec._ring",
    .m_methods = cuda_memory_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__ring(void) {
    return PyModuleDef_Init(&module);
}
