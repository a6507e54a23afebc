/* The ring's protocol; ring.h says what holds and why. */
#define _GNU_SOURCE
#include "ring.h"

#include <poll.h>
#include <string.h>
#include <time.h>

static const uint64_t MAGIC = 0x31474e52434c4f43u; /* "COLCRNG1", ABI 1 */
static const uint64_t CHECKSUM_START = 0xcbf29ce484222325u;

enum {
    SPIN_NS = 20 * 1000,
    SLEEP_NS = 200 * 1000,          /* at most */
    LIVENESS_NS = 20 * 1000 * 1000, /* between looks at the peer's pidfd */
};

/* FNV-1a: every step is a bijection of the state, so one changed byte always changes the result. */
static uint64_t checksum(uint64_t state, const void *data, size_t nbytes) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < nbytes; i++)
        state = (state ^ bytes[i]) * 0x100000001b3u;
    return state;
}

static uint64_t header_checksum(const struct ring_end *end, const struct ring_slot_header *header) {
    uint64_t state = checksum(CHECKSUM_START, &end->geometry, sizeof end->geometry);
    return checksum(state, header, offsetof(struct ring_slot_header, checksum));
}

static uint64_t record_checksum(const struct ring_record *record, uint64_t kind) {
    const uint64_t head[] = {kind, record->seq, record->length};
    return checksum(checksum(CHECKSUM_START, head, sizeof head), record->text, record->length);
}

uint64_t ring_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint32_t ring_slot_of(const struct ring_end *end, uint64_t seq) {
    return (uint32_t)((seq - end->geometry.start_seq) % end->geometry.num_slots);
}

void ring_set_phase(struct ring_end *end, uint64_t phase) {
    if (end->has_left)
        return;
    atomic_store_explicit(&end->own->since_ns, ring_now_ns(), memory_order_relaxed);
    atomic_store_explicit(&end->own->phase, phase, memory_order_relaxed);
}

const char *ring_open(struct ring_end *end, void *memory, size_t nbytes, bool is_writer,
                      const struct ring_geometry *geometry) {
    struct ring_control *control = memory;
    if (nbytes < sizeof *control || geometry->num_slots < 1 ||
        geometry->num_slots > (nbytes - sizeof *control) / RING_HEADER_BYTES)
        return "number of slots, or size of the control block";
    if ((uintptr_t)memory % _Alignof(struct ring_control) != 0)
        return "alignment of the control block";
    memset(end, 0, sizeof *end);
    end->control = control;
    end->geometry = *geometry;
    end->geometry.magic = MAGIC;
    end->own = is_writer ? &control->writer : &control->reader;
    end->peer = is_writer ? &control->reader : &control->writer;
    end->is_writer = is_writer;
    end->peer_fd = -1;
    end->published = end->released = end->taken = geometry->start_seq;
    if (is_writer) {
        control->geometry = end->geometry;
        atomic_store_explicit(&end->own->counter, geometry->start_seq, memory_order_relaxed);
        atomic_store_explicit(&end->peer->counter, geometry->start_seq, memory_order_relaxed);
    }
    if (control->geometry.magic != MAGIC)
        return "magic number (no ring, or one of another version of colospec)";
    if (memcmp(&control->geometry, &end->geometry, sizeof end->geometry) != 0)
        return "geometry (another ring, or other settings)";
    ring_set_phase(end, RING_WORKING);
    return NULL;
}

static enum ring_status corrupt(struct ring_end *end, const char *field) {
    end->record.length = strlen(field);
    memcpy(end->record.text, field, end->record.length);
    return RING_CORRUPT;
}

/* Copy the peer's record and return its kind once `reached` has its number. */
static enum ring_status check_record(struct ring_end *end, uint64_t reached) {
    struct ring_record *copy = &end->record, *record = &end->peer->record;
    /* Acquire: pairs with the release in ring_leave, which comes after the other fields. */
    uint64_t kind = atomic_load_explicit(&record->kind, memory_order_acquire);
    if (kind == RING_ABSENT)
        return RING_AGAIN;
    copy->seq = record->seq;
    copy->length = record->length;
    copy->checksum = record->checksum;
    if (copy->length > RING_TEXT_BYTES)
        return corrupt(end, "length of the other side's last record");
    memcpy(copy->text, record->text, copy->length);
    if (copy->checksum != record_checksum(copy, kind))
        return corrupt(end, "checksum of the other side's last record");
    if (end->is_writer ? kind != RING_CLOSED : kind != RING_END && kind != RING_ERROR)
        return corrupt(end, "kind of the other side's last record");
    if (copy->seq - reached > end->geometry.num_slots)
        return corrupt(end, "sequence number of the other side's last record");
    return copy->seq == reached ? (enum ring_status)kind : RING_AGAIN;
}

static enum ring_status check_writer(struct ring_end *end) {
    /* Acquire: the reader's last use of a slot happens before we write into it. */
    uint64_t released = atomic_load_explicit(&end->peer->counter, memory_order_acquire);
    if (released - end->released > end->published - end->released)
        return corrupt(end, "count of released slots");
    end->released = released;
    enum ring_status status = check_record(end, released);
    bool is_free = !end->has_left && end->published - released < end->geometry.num_slots;
    return status == RING_AGAIN && is_free ? RING_READY : status;
}

static enum ring_status take_slot(struct ring_end *end) {
    struct ring_slot_header *header = &end->header;
    *header = end->control->slots[ring_slot_of(end, end->taken)];
    if (header->seq != end->taken || header->checksum != header_checksum(end, header))
        return corrupt(end, "slot header (sequence number or checksum)");
    end->taken++;
    return RING_READY;
}

static enum ring_status check_reader(struct ring_end *end) {
    /* Acquire: slot header and payload were written before the count. */
    uint64_t published = atomic_load_explicit(&end->peer->counter, memory_order_acquire);
    if (published - end->released > end->geometry.num_slots ||
        published - end->released < end->published - end->released)
        return corrupt(end, "count of published slots");
    end->published = published;
    return published != end->taken ? take_slot(end) : check_record(end, end->taken);
}

static bool peer_is_dead(const struct ring_end *end) {
    struct pollfd peer = {.fd = end->peer_fd, .events = POLLIN};
    return end->peer_fd >= 0 && poll(&peer, 1, 0) == 1;
}

enum ring_status ring_wait(struct ring_end *end, uint64_t until_ns) {
    uint64_t start_ns = ring_now_ns(), now_ns = start_ns, look_ns = start_ns;
    enum ring_status status;
    for (;; now_ns = ring_now_ns()) {
        /* The look at the peer comes before the check, so that the check still sees all that the
         * peer wrote before it died. */
        bool is_dead = now_ns >= look_ns && peer_is_dead(end);
        if (now_ns >= look_ns)
            look_ns = now_ns + LIVENESS_NS;
        status = end->is_writer ? check_writer(end) : check_reader(end);
        if (is_dead && (status == RING_AGAIN || (status == RING_READY && end->is_writer)))
            status = RING_DEAD;
        if (status != RING_AGAIN || now_ns >= until_ns)
            break;
        if (now_ns - start_ns < SPIN_NS)
            continue;
        uint64_t age_ns = now_ns - start_ns;
        struct timespec pause = {.tv_nsec = (long)(age_ns < SLEEP_NS ? age_ns : SLEEP_NS)};
        nanosleep(&pause, NULL);
    }
    atomic_fetch_add_explicit(&end->own->wait_ns, ring_now_ns() - start_ns, memory_order_relaxed);
    return status;
}

enum ring_status ring_advance(struct ring_end *end, uint64_t count, ring_store store,
                              void *context) {
    uint64_t *own = end->is_writer ? &end->published : &end->released;
    uint64_t now = atomic_load_explicit(&end->own->counter, memory_order_relaxed);
    /* Nobody else moves it; a stream may be behind, by all slots at most. */
    if (*own - now > (store == NULL ? 0 : end->geometry.num_slots))
        return corrupt(end, "this side's own counter, which something else has overwritten");
    if (store != NULL && !store(context, &end->own->counter, *own + count))
        return RING_AGAIN;
    *own += count;
    if (store == NULL)
        /* Release: everything this side did with the slots happens before the count. */
        atomic_store_explicit(&end->own->counter, *own, memory_order_release);
    return RING_READY;
}

enum ring_status ring_publish(struct ring_end *end, const char note[RING_NOTE_BYTES],
                              ring_store store, void *context) {
    struct ring_slot_header *header = &end->control->slots[ring_slot_of(end, end->published)];
    header->seq = end->published;
    memcpy(header->note, note, RING_NOTE_BYTES);
    header->checksum = header_checksum(end, header);
    return ring_advance(end, 1, store, context);
}

void ring_leave(struct ring_end *end, enum ring_status kind, const char *text, size_t length) {
    struct ring_record *record = &end->own->record;
    if (end->has_left)
        return;
    record->seq = end->is_writer ? end->published : end->released;
    record->length = length;
    memcpy(record->text, text, length);
    record->checksum = record_checksum(record, kind);
    /* Release: the peer sees the kind only together with the fields above. */
    atomic_store_explicit(&record->kind, kind, memory_order_release);
    ring_set_phase(end, kind);
    end->has_left = true;
}
