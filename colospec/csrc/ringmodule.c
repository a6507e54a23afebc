/* colospec._ring: the Python face of ring.c. One object is one side of one ring.
 *
 * Results are statuses, not exceptions: colospec.ring.channel turns them into errors that carry the
 * state of both sides. Only misuse raises here (ValueError).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "cuda_driver.h"
#include "ring.h"

static const uint64_t SIGNAL_CHECK_NS = 50 * 1000 * 1000;

typedef struct {
    PyObject_HEAD Py_buffer memory; /* keeps the mapping alive */
    struct ring_end end;
} Ring;

static int parse_tensor(PyObject *row, struct ring_tensor *tensor, uint64_t max_tokens) {
    const char *name;
    unsigned long long width, offset;
    if (!PyArg_ParseTuple(row, "sIIKK", &name, &tensor->dtype, &tensor->itemsize, &width, &offset))
        return -1;
    if (strlen(name) >= RING_NAME_BYTES) {
        PyErr_Format(PyExc_ValueError, "tensor name %s is longer than %d bytes", name,
                     RING_NAME_BYTES - 1);
        return -1;
    }
    strcpy(tensor->name, name);
    tensor->width = width;
    tensor->offset = offset;
    tensor->nbytes = max_tokens * width * tensor->itemsize;
    return 0;
}

/* (num_slots, slot_bytes, max_tokens, max_sequences, start_seq, ((name, dtype code, itemsize,
 * width, offset), ...)) */
static int parse_geometry(PyObject *tuple, struct ring_geometry *geometry) {
    PyObject *table;
    unsigned long long slot_bytes, max_tokens, max_sequences, start_seq;
    memset(geometry, 0, sizeof *geometry);
    if (!PyArg_ParseTuple(tuple, "IKKKKO!", &geometry->num_slots, &slot_bytes, &max_tokens,
                          &max_sequences, &start_seq, &PyTuple_Type, &table))
        return -1;
    if (PyTuple_Size(table) > RING_MAX_TENSORS) {
        PyErr_Format(PyExc_ValueError, "%zd tensors; a slot holds at most %d", PyTuple_Size(table),
                     RING_MAX_TENSORS);
        return -1;
    }
    geometry->slot_bytes = slot_bytes;
    geometry->max_tokens = max_tokens;
    geometry->max_sequences = max_sequences;
    geometry->start_seq = start_seq;
    geometry->num_tensors = (uint32_t)PyTuple_Size(table);
    for (uint32_t i = 0; i < geometry->num_tensors; i++)
        if (parse_tensor(PyTuple_GetItem(table, i), &geometry->tensors[i], max_tokens) < 0)
            return -1;
    return 0;
}

static int open_memory(Ring *self, PyObject *memory, struct ring_geometry *geometry) {
    if (PyObject_GetBuffer(memory, &self->memory, PyBUF_WRITABLE) < 0)
        return -1;
    size_t nbytes = (size_t)self->memory.len;
    if (geometry != NULL && nbytes >= ring_control_bytes(geometry->num_slots))
        ring_format(self->memory.buf, geometry);
    const char *fault = ring_open(&self->end, self->memory.buf, nbytes, geometry != NULL);
    if (fault == NULL) {
        ring_set_phase(&self->end, RING_ATTACHED);
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "the ring's control block is damaged or foreign: %s", fault);
    return -1;
}

static PyObject *new_ring(PyTypeObject *type, PyObject *args, PyObject *Py_UNUSED(kwargs)) {
    PyObject *memory, *description = NULL;
    struct ring_geometry geometry;
    if (!PyArg_ParseTuple(args, "O|O!", &memory, &PyTuple_Type, &description))
        return NULL;
    if (description != NULL && parse_geometry(description, &geometry) < 0)
        return NULL;
    PyObject *self = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL || open_memory((Ring *)self, memory, description ? &geometry : NULL) == 0)
        return self;
    Py_DECREF(self);
    return NULL;
}

static void dealloc_ring(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    if (((Ring *)object)->memory.obj != NULL)
        PyBuffer_Release(&((Ring *)object)->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* Wait without the GIL, in pieces short enough for Ctrl-C. Returns a status or -1. */
static int wait_for(Ring *self, ring_check *check, double timeout_s) {
    uint64_t deadline_ns = ring_now_ns() + (uint64_t)(timeout_s * 1e9);
    for (;;) {
        uint64_t piece_ns = ring_now_ns() + SIGNAL_CHECK_NS;
        bool is_last = piece_ns >= deadline_ns;
        PyThreadState *thread = PyEval_SaveThread();
        enum ring_status status = ring_wait(&self->end, check, is_last ? deadline_ns : piece_ns);
        PyEval_RestoreThread(thread);
        if (PyErr_CheckSignals() < 0)
            return -1;
        if (status != RING_AGAIN || is_last)
            return (int)status;
    }
}

static PyObject *describe_slot(const struct ring_end *end) {
    const struct ring_micro_batch *what = &end->header.what;
    return Py_BuildValue("(IKKKKKK)", ring_slot_of(end, end->taken - 1), what->epoch,
                         what->micro_batch, what->step, what->digest, what->num_tokens,
                         what->num_sequences);
}

static PyObject *describe(const struct ring_end *end, enum ring_status status) {
    switch (status) {
    case RING_READY:
        if (!end->is_writer)
            return describe_slot(end);
        return PyLong_FromUnsignedLong(ring_slot_of(end, end->published));
    case RING_ERROR:
        return PyUnicode_DecodeUTF8(end->record.text, (Py_ssize_t)end->record.length, "replace");
    case RING_CORRUPT:
        return PyUnicode_FromString(end->fault);
    default:
        return Py_NewRef(Py_None);
    }
}

static int parse_timeout(PyObject *timeout, double *timeout_s) {
    *timeout_s = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred())
        return -1;
    if (*timeout_s >= 0 && *timeout_s < 1e9)
        return 0;
    PyErr_Format(PyExc_ValueError, "timeout_s=%R must be in [0, 1e9)", timeout);
    return -1;
}

static PyObject *acquire(PyObject *object, PyObject *timeout) {
    Ring *self = (Ring *)object;
    double timeout_s;
    if (parse_timeout(timeout, &timeout_s) < 0)
        return NULL;
    ring_set_phase(&self->end, RING_WAITING);
    int status = wait_for(self, self->end.is_writer ? ring_check_free : ring_check_full, timeout_s);
    if (status < 0)
        return NULL;
    ring_set_phase(&self->end, status == RING_READY ? RING_HOLDING : RING_ATTACHED);
    PyObject *detail = describe(&self->end, (enum ring_status)status);
    return detail == NULL ? NULL : Py_BuildValue("iN", status, detail);
}

static PyObject *wait_closed(PyObject *object, PyObject *timeout) {
    Ring *self = (Ring *)object;
    double timeout_s;
    if (parse_timeout(timeout, &timeout_s) < 0)
        return NULL;
    if (!self->end.is_writer)
        return PyErr_Format(PyExc_ValueError, "only a writer waits for the reader to close");
    int status = wait_for(self, ring_check_closed, timeout_s);
    return status < 0 ? NULL : PyLong_FromLong(status);
}

static PyObject *publish(PyObject *object, PyObject *args) {
    struct ring_end *end = &((Ring *)object)->end;
    unsigned long long epoch, micro_batch, step, digest, num_tokens, num_sequences;
    if (!PyArg_ParseTuple(args, "KKKKKK", &epoch, &micro_batch, &step, &digest, &num_tokens,
                          &num_sequences))
        return NULL;
    struct ring_micro_batch what = {epoch, micro_batch, step, digest, num_tokens, num_sequences};
    if (!end->is_writer || end->published - end->released >= end->geometry.num_slots ||
        num_tokens > end->geometry.max_tokens || num_sequences > end->geometry.max_sequences)
        return PyErr_Format(PyExc_ValueError, "no free slot for %llu tokens in %llu sequences",
                            num_tokens, num_sequences);
    ring_stage(end, &what);
    enum ring_status status = ring_publish(end);
    ring_set_phase(end, RING_ATTACHED);
    return PyLong_FromLong(status);
}

static PyObject *release(PyObject *object, PyObject *number) {
    struct ring_end *end = &((Ring *)object)->end;
    size_t count = PyLong_AsSize_t(number);
    if (PyErr_Occurred())
        return NULL;
    if (end->is_writer || count > end->taken - end->released)
        return PyErr_Format(PyExc_ValueError, "%zu slots to release, but not so many are taken",
                            count);
    enum ring_status status = ring_release(end, count);
    if (end->taken == end->released)
        ring_set_phase(end, RING_ATTACHED);
    return PyLong_FromLong(status);
}

static PyObject *leave(PyObject *object, PyObject *args) {
    struct ring_end *end = &((Ring *)object)->end;
    int kind;
    const char *text;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "iy#", &kind, &text, &length))
        return NULL;
    if (length > RING_TEXT_BYTES || (kind == RING_RECORD_CLOSE) == end->is_writer ||
        kind <= RING_NONE || kind > RING_RECORD_CLOSE)
        return PyErr_Format(PyExc_ValueError, "record %d of %zd bytes", kind, length);
    ring_leave_record(end, (enum ring_record_kind)kind, text, (size_t)length);
    ring_set_phase(end, kind == RING_RECORD_END     ? RING_ENDED
                        : kind == RING_RECORD_ERROR ? RING_FAILED
                                                    : RING_LEFT);
    Py_RETURN_NONE;
}

static PyObject *watch(PyObject *object, PyObject *pidfd) {
    long fd = PyLong_AsLong(pidfd);
    if (PyErr_Occurred())
        return NULL;
    ((Ring *)object)->end.peer_fd = (int)fd;
    Py_RETURN_NONE;
}

static PyObject *describe_side(const struct ring_side *side) {
    uint64_t since_ns = atomic_load_explicit(&side->since_ns, memory_order_relaxed);
    return Py_BuildValue("Kdd", atomic_load_explicit(&side->phase, memory_order_relaxed),
                         ((double)ring_now_ns() - (double)since_ns) * 1e-9,
                         (double)atomic_load_explicit(&side->wait_ns, memory_order_relaxed) * 1e-9);
}

static PyObject *state(PyObject *object, PyObject *Py_UNUSED(ignored)) {
    const struct ring_end *end = &((Ring *)object)->end;
    const struct ring_control *control = end->control;
    uint64_t start = end->geometry.start_seq;
    return Py_BuildValue("KKNN", atomic_load(&control->published) - start,
                         atomic_load(&control->released) - start, describe_side(&control->writer),
                         describe_side(&control->reader));
}

static PyObject *control_bytes(PyObject *Py_UNUSED(module), PyObject *number) {
    unsigned long num_slots = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (num_slots < 1 || num_slots > RING_MAX_SLOTS)
        return PyErr_Format(PyExc_ValueError, "ring.num_slots=%lu must be in [1, %d]", num_slots,
                            RING_MAX_SLOTS);
    return PyLong_FromSize_t(ring_control_bytes((uint32_t)num_slots));
}

static PyObject *cuda_driver_error(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored)) {
    const char *error;
    if (load_cuda_driver(&error) == NULL)
        return PyUnicode_DecodeLocale(error, "surrogateescape");
    Py_RETURN_NONE;
}

static PyMethodDef ring_methods[] = {
    {"acquire", acquire, METH_O, "acquire(timeout_s) -> (status, detail)"},
    {"publish", publish, METH_VARARGS, "publish(epoch, micro_batch, step, digest, tokens, seqs)"},
    {"release", release, METH_O, "release(count) -> status, of the oldest slots taken"},
    {"leave", leave, METH_VARARGS, "leave(kind, text): write END, ERROR or CLOSE"},
    {"wait_closed", wait_closed, METH_O, "wait_closed(timeout_s) -> status"},
    {"watch", watch, METH_O, "watch(pidfd): of the peer, borrowed"},
    {"state", state, METH_NOARGS, "state() -> (published, released, writer, reader)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_doc, "One side of a ring: Ring(memory, geometry) writes, Ring(memory) reads."},
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

static int exec_module(PyObject *module) {
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"READY", RING_READY},
        {"AGAIN", RING_AGAIN},
        {"END", RING_END},
        {"ERROR", RING_ERROR},
        {"CLOSED", RING_CLOSED},
        {"DEAD", RING_DEAD},
        {"CORRUPT", RING_CORRUPT},
        {"RECORD_END", RING_RECORD_END},
        {"RECORD_ERROR", RING_RECORD_ERROR},
        {"RECORD_CLOSE", RING_RECORD_CLOSE},
        {"TEXT_BYTES", RING_TEXT_BYTES},
        {"ALIGNMENT", RING_ALIGNMENT},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return -1;
    PyObject *type = PyType_FromSpec(&ring_spec);
    int result = type == NULL ? -1 : PyModule_AddObjectRef(module, "Ring", type);
    Py_XDECREF(type);
    return result;
}

static PyMethodDef module_methods[] = {
    {"control_bytes", control_bytes, METH_O, "control_bytes(num_slots) -> size of the block"},
    {"cuda_driver_error", cuda_driver_error, METH_NOARGS,
     "None if libcuda can be used, or why not"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, exec_module}, {0, NULL}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "colospec._ring",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__ring(void) {
    return PyModuleDef_Init(&module);
}
