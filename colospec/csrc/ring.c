/* The ring's protocol; ring.h says what holds and why. */
#define _GNU_SOURCE
#include "ring.h"

#include <poll.h>
#include <string.h>
#include <time.h>

static const uint64_t MAGIC = 0x31474e52434c4f43u; /* "COLCRNG1" */
static const uint32_t SLOT_DATA = 0x41544144u;     /* "DATA" */

enum {
    SPIN_NS = 20 * 1000,
    FIRST_SLEEP_NS = 20 * 1000,
    LAST_SLEEP_NS = 200 * 1000,
    LIVENESS_NS = 20 * 1000 * 1000, /* between looks at the peer's pidfd */
};

/* FNV-1a: every step is a bijection of the state, so one changed byte always changes the result. */
static uint64_t checksum(uint64_t state, const void *data, size_t nbytes) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < nbytes; i++)
        state = (state ^ bytes[i]) * 0x100000001b3u;
    return state;
}

static const uint64_t CHECKSUM_START = 0xcbf29ce484222325u;

static uint64_t geometry_checksum(const struct ring_geometry *geometry) {
    return checksum(CHECKSUM_START, geometry, offsetof(struct ring_geometry, checksum));
}

static uint64_t record_checksum(const struct ring_record *record, uint64_t kind) {
    uint64_t state = checksum(CHECKSUM_START, &kind, sizeof kind);
    state = checksum(state, &record->seq, sizeof record->seq);
    state = checksum(state, &record->length, sizeof record->length);
    return checksum(state, record->text, record->length);
}

uint64_t ring_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

size_t ring_control_bytes(uint32_t num_slots) {
    return sizeof(struct ring_control) + num_slots * sizeof(struct ring_slot_header);
}

static bool tensor_is_sound(const struct ring_tensor *tensor,
                            const struct ring_geometry *geometry) {
    uint64_t row_bytes, nbytes, stop;
    if (tensor->name[0] == 0 || tensor->name[RING_NAME_BYTES - 1] != 0 ||
        tensor->offset % RING_ALIGNMENT != 0)
        return false;
    if (__builtin_mul_overflow(tensor->width, (uint64_t)tensor->itemsize, &row_bytes) ||
        __builtin_mul_overflow(row_bytes, geometry->max_tokens, &nbytes) ||
        __builtin_add_overflow(tensor->offset, nbytes, &stop))
        return false;
    return row_bytes > 0 && tensor->nbytes == nbytes && stop <= geometry->slot_bytes;
}

static const char *geometry_fault(const struct ring_geometry *geometry, size_t control_bytes) {
    if (geometry->magic != MAGIC)
        return "magic number (this is no ring)";
    if (geometry->abi != RING_ABI)
        return "ABI version (the other rank runs another version of colospec)";
    if (geometry->checksum != geometry_checksum(geometry))
        return "checksum of the geometry";
    if (geometry->num_slots < 1 || geometry->num_slots > RING_MAX_SLOTS ||
        control_bytes < ring_control_bytes(geometry->num_slots))
        return "number of slots";
    if (geometry->num_tensors < 1 || geometry->num_tensors > RING_MAX_TENSORS)
        return "number of tensors";
    for (uint32_t i = 0; i < geometry->num_tensors; i++)
        if (!tensor_is_sound(&geometry->tensors[i], geometry))
            return "tensor table";
    return NULL;
}

void ring_format(struct ring_control *control, struct ring_geometry *geometry) {
    geometry->magic = MAGIC;
    geometry->abi = RING_ABI;
    geometry->checksum = geometry_checksum(geometry);
    control->geometry = *geometry;
    atomic_store_explicit(&control->published, geometry->start_seq, memory_order_relaxed);
    atomic_store_explicit(&control->released, geometry->start_seq, memory_order_relaxed);
}

const char *ring_open(struct ring_end *end, void *control, size_t nbytes, bool is_writer) {
    memset(end, 0, sizeof *end);
    if (nbytes < sizeof(struct ring_control))
        return "size of the control block";
    if ((uintptr_t)control % _Alignof(struct ring_control) != 0)
        return "alignment of the control block";
    end->control = control;
    end->geometry = end->control->geometry;
    end->is_writer = is_writer;
    end->peer_fd = -1;
    end->published = end->released = end->taken = end->geometry.start_seq;
    end->fault = geometry_fault(&end->geometry, nbytes);
    return end->fault;
}

uint32_t ring_slot_of(const struct ring_end *end, uint64_t seq) {
    return (uint32_t)((seq - end->geometry.start_seq) % end->geometry.num_slots);
}

static struct ring_side *own_side(struct ring_end *end) {
    return end->is_writer ? &end->control->writer : &end->control->reader;
}

void ring_set_phase(struct ring_end *end, enum ring_phase phase) {
    atomic_store_explicit(&own_side(end)->since_ns, ring_now_ns(), memory_order_relaxed);
    atomic_store_explicit(&own_side(end)->phase, phase, memory_order_relaxed);
}

static enum ring_status corrupt(struct ring_end *end, const char *fault) {
    end->fault = fault;
    return RING_CORRUPT;
}

/* Copy the peer's record and say RING_READY once `reached` has its number. */
static enum ring_status check_record(struct ring_end *end, struct ring_record *record,
                                     uint64_t reached) {
    struct ring_record *copy = &end->record;
    /* Acquire: pairs with the release in ring_leave_record, which comes after the other fields. */
    uint64_t kind = atomic_load_explicit(&record->kind, memory_order_acquire);
    if (kind == RING_NONE)
        return RING_AGAIN;
    copy->seq = record->seq;
    copy->length = record->length;
    copy->checksum = record->checksum;
    if (copy->length > RING_TEXT_BYTES)
        return corrupt(end, "length of the other side's last record");
    memcpy(copy->text, record->text, copy->length);
    if (copy->checksum != record_checksum(copy, kind))
        return corrupt(end, "checksum of the other side's last record");
    if (end->is_writer ? kind != RING_RECORD_CLOSE
                       : kind != RING_RECORD_END && kind != RING_RECORD_ERROR)
        return corrupt(end, "kind of the other side's last record");
    if (copy->seq - reached > end->geometry.num_slots)
        return corrupt(end, "sequence number of the other side's last record");
    atomic_store_explicit(&copy->kind, kind, memory_order_relaxed);
    return copy->seq == reached ? RING_READY : RING_AGAIN;
}

static enum ring_status refresh_released(struct ring_end *end) {
    /* Acquire: the reader's last use of a slot happens before we write into it. */
    uint64_t released = atomic_load_explicit(&end->control->released, memory_order_acquire);
    if (released - end->released > end->published - end->released)
        return corrupt(end, "count of released slots");
    end->released = released;
    return RING_READY;
}

enum ring_status ring_check_closed(struct ring_end *end) {
    if (refresh_released(end) == RING_CORRUPT)
        return RING_CORRUPT;
    enum ring_status status = check_record(end, &end->control->reader_record, end->released);
    return status == RING_READY ? RING_CLOSED : status;
}

enum ring_status ring_check_free(struct ring_end *end) {
    enum ring_status status = ring_check_closed(end);
    if (status != RING_AGAIN)
        return status;
    return end->published - end->released < end->geometry.num_slots ? RING_READY : RING_AGAIN;
}

static struct ring_slot_header make_header(const struct ring_geometry *geometry, uint64_t seq,
                                           const struct ring_micro_batch *what) {
    struct ring_slot_header header = {.seq = seq, .what = *what, .kind = SLOT_DATA};
    header.num_tensors = geometry->num_tensors;
    for (uint32_t i = 0; i < geometry->num_tensors; i++) {
        header.tensors[i] = geometry->tensors[i];
        header.tensors[i].nbytes =
            what->num_tokens * header.tensors[i].width * header.tensors[i].itemsize;
    }
    header.checksum =
        checksum(CHECKSUM_START, &header, offsetof(struct ring_slot_header, checksum));
    return header;
}

/* Only one header can be right for this number and this micro-batch: make it and compare. */
static enum ring_status take_slot(struct ring_end *end) {
    struct ring_slot_header *header = &end->header, expected;
    *header = end->control->slots[ring_slot_of(end, end->taken)];
    expected = make_header(&end->geometry, end->taken, &header->what);
    if (memcmp(header, &expected,
               offsetof(struct ring_slot_header, checksum) + sizeof header->checksum) != 0)
        return corrupt(end, "slot header (sequence number, tensor table or checksum)");
    if (header->what.num_tokens > end->geometry.max_tokens ||
        header->what.num_sequences > end->geometry.max_sequences)
        return corrupt(end, "number of tokens or sequences in a slot header");
    end->taken++;
    return RING_READY;
}

enum ring_status ring_check_full(struct ring_end *end) {
    /* Acquire: slot header and payload were written before the count. */
    uint64_t published = atomic_load_explicit(&end->control->published, memory_order_acquire);
    if (published - end->released > end->geometry.num_slots ||
        published - end->released < end->published - end->released)
        return corrupt(end, "count of published slots");
    end->published = published;
    if (published != end->taken)
        return take_slot(end);
    enum ring_status status = check_record(end, &end->control->writer_record, end->taken);
    if (status != RING_READY)
        return status;
    return atomic_load_explicit(&end->record.kind, memory_order_relaxed) == RING_RECORD_END
               ? RING_END
               : RING_ERROR;
}

static bool peer_is_dead(const struct ring_end *end) {
    struct pollfd peer = {.fd = end->peer_fd, .events = POLLIN};
    return end->peer_fd >= 0 && poll(&peer, 1, 0) == 1;
}

static enum ring_status wait_until(struct ring_end *end, ring_check *check, uint64_t start_ns,
                                   uint64_t until_ns) {
    uint64_t look_ns = start_ns, pause_ns = FIRST_SLEEP_NS;
    for (;;) {
        uint64_t now_ns = ring_now_ns();
        /* The look at the peer comes before the check, so that the check still sees all that the
         * peer wrote before it died. */
        bool is_dead = now_ns >= look_ns && peer_is_dead(end);
        if (now_ns >= look_ns)
            look_ns = now_ns + LIVENESS_NS;
        enum ring_status status = check(end);
        if (is_dead && (status == RING_AGAIN || (status == RING_READY && end->is_writer)))
            return RING_DEAD;
        if (status != RING_AGAIN || now_ns >= until_ns)
            return status;
        if (now_ns - start_ns < SPIN_NS)
            continue;
        struct timespec pause = {
            .tv_nsec = (long)(pause_ns < until_ns - now_ns ? pause_ns : until_ns - now_ns)};
        nanosleep(&pause, NULL);
        pause_ns = pause_ns * 3 / 2 < LAST_SLEEP_NS ? pause_ns * 3 / 2 : LAST_SLEEP_NS;
    }
}

enum ring_status ring_wait(struct ring_end *end, ring_check *check, uint64_t until_ns) {
    uint64_t start_ns = ring_now_ns();
    enum ring_status status = wait_until(end, check, start_ns, until_ns);
    if (check != ring_check_closed)
        atomic_fetch_add_explicit(&own_side(end)->wait_ns, ring_now_ns() - start_ns,
                                  memory_order_relaxed);
    return status;
}

void ring_stage(struct ring_end *end, const struct ring_micro_batch *what) {
    end->control->slots[ring_slot_of(end, end->published)] =
        make_header(&end->geometry, end->published, what);
}

/* Move our own counter on from the host, after a look that nobody else has moved it. */
static enum ring_status advance(struct ring_end *end, _Atomic uint64_t *word, uint64_t *own,
                                uint64_t count) {
    if (atomic_load_explicit(word, memory_order_relaxed) != *own)
        return corrupt(end, "this side's own counter, which something else has overwritten");
    *own += count;
    /* Release: everything this side did with the slots happens before the count. */
    atomic_store_explicit(word, *own, memory_order_release);
    return RING_READY;
}

enum ring_status ring_publish(struct ring_end *end) {
    return advance(end, &end->control->published, &end->published, 1);
}

enum ring_status ring_release(struct ring_end *end, uint64_t count) {
    return advance(end, &end->control->released, &end->released, count);
}

void ring_leave_record(struct ring_end *end, enum ring_record_kind kind, const char *text,
                       size_t length) {
    struct ring_record *record =
        end->is_writer ? &end->control->writer_record : &end->control->reader_record;
    if (atomic_load_explicit(&record->kind, memory_order_relaxed) != RING_NONE)
        return;
    record->seq = end->is_writer ? end->published : end->released;
    record->length = length;
    memcpy(record->text, text, length);
    record->checksum = record_checksum(record, kind);
    /* Release: the peer sees the kind only together with the fields above. */
    atomic_store_explicit(&record->kind, kind, memory_order_release);
}
